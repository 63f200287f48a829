r"""A reply's text to text and tool calls, as it comes: one reader for every form in which the models of the family write calls.

    [get_weather(city="Paris"), add(a=1, b=-2.5)]              Llama 4, as Meta's prompt guide asks for it
    {"name": "add", "parameters": {"a": 1}}                    Llama 4, as transformers' template asks for it; "arguments" too
    [{"name": "add", "arguments": {"a": 1}}, ...]              the same in a list
    <tool_call>[{"name": "add", "arguments": {}}]</tool_call>  SmolLM2 (Cria) and others of its time
    <function=add>{"a": 1}</function>                          Llama 4, after Meta's example of a format of one's own

Whatever form is asked for, weights write others too, with text around. A call opens at any place with the name of a tool that there is.
What turns out to be no call is text, to the last character: unknown names, bad syntax, expressions, a call that the end of the reply cuts.
A list in brackets is a call or text as a whole.

The text is read character by character, by generators, so that how it was cut into pieces cannot matter. Arguments are put into JSON on
the way; a piece of them is given out once it is certain: an escape or a number only as a whole. Calls of a form that a grammar guards are
sure to be completed once they have opened and are given out as they come (`trusted`); others are held back until they are whole, up to
MOST_CHARS.
"""

import re
import secrets
from collections import deque
from collections.abc import Callable, Iterable

from herd.chat import ChatEvent, Text, ToolCallDelta, ToolCallEnd, ToolCallStart
from herd.text.literals import SPACES, BrokenError, Literals, Step

MOST_CHARS = 1 << 16  # of one call, or list of calls, that is held back
OPENING_CHARS = 256  # within which a call must name its tool
KEYWORD = re.compile(r"[^\W\d][\w.$-]*")  # what may stand before "=": Python's names, and those that JSON schemas have besides


def new_call_id() -> str:
    """An id for a call, unlike any other."""
    return f"call_{secrets.token_hex(12)}"


class CallReader:
    """Push text, get events: text, and calls of the tools that are named. The events' fold does not depend on how the text is cut."""

    def __init__(
        self,
        names: Iterable[str],
        *,
        parallel: bool = True,
        trusted: Iterable[str] = (),
        required: bool = False,
        new_id: Callable[[], str] = new_call_id,
    ) -> None:
        """parallel: whether a reply may have several calls; if not, `stopped` after the first.

        trusted: forms ("pythonic", "json", "tags") whose calls are sure to be whole once they have opened.
        required: the reply is calls and nothing else, so that what its end cuts off before it has opened is no text either.
        """
        self.num_calls = 0  # that are whole
        self.stopped = False  # nothing more is read
        self._names = {name.replace("-", "_"): name for name in names}  # a name in Python has no "-"
        self._names.update({name: name for name in self._names.values()})
        self._parallel, self._trusted, self._new_id = parallel, frozenset(trusted), new_id
        self._required = required
        self._out: list[ChatEvent] = []  # certain
        self._held: list[ChatEvent] = []  # of calls that are not yet sure
        self._text = ""  # certain, not yet an event
        self._values = Literals()  # reads arguments; its `json` is what of them is not yet an event
        self._gap = ""  # of white space, and after a call separators: text if no call follows
        self._in_gap = True
        self._attempt: Step | None = None  # at a call
        self._raw: list[str] = []  # what it has read
        self._is_open = self._may_end = False  # it has named a tool; nothing but a closing mark is missing
        self._is_live = False  # its form is trusted
        self._num_started = 0

    def push(self, text: str) -> list[ChatEvent]:
        """The events that are certain once this text is known."""
        queue = deque(text)
        while queue and not self.stopped:
            self._read(queue.popleft(), queue)
        return self._events()

    def finish(self) -> list[ChatEvent]:
        """The last events, when no text will follow."""
        queue: deque[str] = deque()
        while self._attempt and not self.stopped:
            if self._may_end:
                self._accept()
            elif self._is_live and self._is_open:
                self.stopped = True  # cut in the middle of a call
            elif self._required and not self._is_open:
                self._end_attempt()
            else:
                self._refuse(queue, at_end=True)
                while queue:
                    self._read(queue.popleft(), queue)
        if not self.num_calls and not self._num_started and not self._required:
            self._text += self._gap
        self._gap = ""
        return self._events()

    # ---- text, and where calls begin and end

    def _read(self, char: str, queue: deque[str]) -> None:
        if self._attempt is None:
            if char not in "[{<":
                self._plain(char)
                return
            self._attempt, self._raw = self._call(char), [char]
            next(self._attempt)
            return
        if not (self._is_live and self._is_open):
            self._raw.append(char)
        try:
            if len(self._raw) > (MOST_CHARS if self._is_open else OPENING_CHARS):
                raise BrokenError
            self._send(char)
        except StopIteration:
            self._accept()
        except BrokenError:
            self._refuse(queue)

    def _send(self, char: str) -> None:
        assert self._attempt is not None
        self._attempt.send(char)
        while self._values.back:
            char, self._values.back = self._values.back, ""
            self._attempt.send(char)

    def _plain(self, char: str) -> None:
        if self._in_gap and len(self._gap) < OPENING_CHARS and (char in SPACES or (self._num_started and char in ";,")):
            self._gap += char
            return
        self._text += self._gap + char
        self._gap, self._in_gap = "", False

    def _accept(self) -> None:
        """The attempt was a call, or several."""
        self._flush_json()
        self._out += self._held
        self.num_calls = self._num_started
        self._end_attempt()
        self._gap, self._in_gap = "", True

    def _refuse(self, queue: deque[str], at_end: bool = False) -> None:
        """The attempt was none. What it has read is text; but a call may begin after its first character if it had not opened, and at
        the character that broke it if it had.
        """
        if self._is_live and self._is_open:  # only a grammar at fault could do that: what has been given out cannot be taken back
            self.stopped = True
            self._flush_json()
            self._end_attempt()
            return
        raw = self._raw
        cut = (len(raw) if at_end else len(raw) - 1) if self._is_open else 1
        queue.extendleft(reversed(raw[cut:]))
        self._num_started = self.num_calls
        self._end_attempt()
        for char in raw[:cut]:
            self._plain(char)

    def _end_attempt(self) -> None:
        self._attempt, self._raw, self._held = None, [], []
        self._is_open = self._may_end = self._is_live = False
        self._values.reset()

    def _events(self) -> list[ChatEvent]:
        if self._is_live:
            self._flush_json()
        self._flush_text()
        out, self._out = self._out, []
        return out

    def _flush_text(self) -> None:
        if self._text:
            self._out.append(Text(text=self._text))
            self._text = ""

    def _flush_json(self) -> None:
        if self._values.json:
            self._emit(ToolCallDelta(index=self._num_started - 1, arguments=self._values.json))
            self._values.json = ""

    def _emit(self, event: ChatEvent) -> None:
        if self._is_live:
            self._out.append(event)
        else:
            self._held.append(event)

    def _open(self, written: str) -> None:
        if written not in self._names:
            raise BrokenError
        self._flush_text()
        self._is_open = True
        self._emit(ToolCallStart(index=self._num_started, id=self._new_id(), name=self._names[written]))
        self._num_started += 1

    def _close(self) -> None:
        self._flush_json()
        self._emit(ToolCallEnd(index=self._num_started - 1))
        if self._is_live:
            self.num_calls = self._num_started
        if not self._parallel:
            self._accept()
            self.stopped = True

    # ---- the forms; each generator takes characters with `yield`

    def _call(self, first: str) -> Step:
        if first == "<":
            yield from self._tagged()
        elif first == "{":
            self._is_live = "json" in self._trusted
            yield from self._json_call()
        else:
            char = yield from self._values.space()
            if char == "{":
                yield from self._json_list(char)
            else:
                self._is_live = "pythonic" in self._trusted
                yield from self._python_list(char)
        return ""

    def _tagged(self) -> Step:
        char = yield
        if char == "f":
            yield from self._values.literal("unction=")
            name, char = "", (yield)
            while char != ">":
                name += char
                char = yield
            self._open(name)
            yield from self._values.object((yield from self._values.space()))
            self._close()
            self._may_end = True
            yield from self._values.literal("</function>", (yield from self._values.space()))
            return ""
        yield from self._values.literal("tool_call>", char)
        self._is_live = "tags" in self._trusted
        char = yield from self._values.space()
        if char == "[":
            yield from self._json_list((yield from self._values.space()))
            self._may_end = True
            char = yield from self._values.space()
        else:
            while char == "{":
                self._may_end = False
                yield from self._json_call()
                self._may_end = True
                char = yield from self._values.space()
        if not self._may_end:
            raise BrokenError
        yield from self._values.literal("</tool_call>", char)
        return ""

    def _json_list(self, char: str) -> Step:
        """After "["."""
        while char != "]":
            if char != "{":
                raise BrokenError
            yield from self._json_call()
            char = yield from self._values.comma("]")
        return ""

    def _json_call(self) -> Step:
        """After "{"."""
        named = given = False
        char = yield from self._values.space()
        while char != "}":
            key = yield from self._values.short_string(char)
            yield from self._values.literal(":", (yield from self._values.space()))
            char = yield from self._values.space()
            if key == "name" and not named:
                self._open((yield from self._values.short_string(char)))
                named = True
            elif key in ("parameters", "arguments") and named and not given:
                yield from self._values.object(char)
                given = True
            elif key not in ("id", "type") or ((yield from self._values.short_string(char)) != "function" and key == "type"):
                raise BrokenError
            char = yield from self._values.comma("}")
        if not given:
            raise BrokenError
        self._close()
        return ""

    def _python_list(self, char: str) -> Step:
        """After "["."""
        is_first = True
        while is_first or char != "]":
            name, char = yield from self._values.name(char)
            yield from self._values.literal("(", (yield from self._values.space(char)))
            self._open(name)
            yield from self._keywords((yield from self._values.space()))
            self._close()
            is_first, char = False, (yield from self._values.comma("]"))
        return ""

    def _keywords(self, char: str) -> Step:
        """After "("."""
        keys: set[str] = set()
        self._values.json += "{"
        while char != ")":
            key, char = yield from self._values.name(char)
            if not KEYWORD.fullmatch(key) or (key in keys and not self._is_live):
                raise BrokenError
            self._values.json += f'{", " if keys else ""}"{key}": '
            keys.add(key)
            yield from self._values.literal("=", (yield from self._values.space(char)))
            yield from self._values.value((yield from self._values.space()))
            char = yield from self._values.comma(")")
        self._values.json += "}"
        return ""
