"""A conversation in the terminal and the commands that act on it.

A message becomes part of the conversation together with its reply, or not at all: what failed, or was stopped before the first word, is
kept aside for /retry. Ctrl-C ends a reply where it is, and what was said belongs to the conversation.
"""

import json
import shlex
import signal
import sys
import termios
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

from herd.chat import Done, Message, Sampling
from herd.cli.terminal.clean import clean
from herd.cli.terminal.said import parse
from herd.cli.terminal.transcript import load, save
from herd.engine.local import Model
from herd.engine.reply import Reply
from herd.errors import ContextError, UsageError, nearest

COMMANDS = {
    "help": ("", "show this"),
    "system": ("[TEXT]", "what the model is told first; none takes it away"),
    "set": ("[FIELD [VALUE]]", "sampling: /set temperature 0.3, /set seed default"),
    "undo": ("", "take back the last exchange, or a /clear or /load"),
    "retry": ("", "another reply to the last message"),
    "clear": ("", "forget the conversation"),
    "save": ("FILE", "write it to a .json or .md file; /save! overwrites"),
    "load": ("FILE", "go on with a conversation from a .json file"),
    "model": ("[NAME]", "show the model, or go on with another"),
    "stats": ("", "tokens, speed, how much of the context is used"),
    "quit": ("", "end; so does Ctrl-D"),
}
FIELDS = tuple(field.name for field in fields(Sampling) if field.name not in ("format", "logprobs"))

_STATUS_S = 0.5  # without a word until the terminal says what is going on
_NEARLY_FULL = 0.8


class View(Protocol):
    """Where a reply is shown."""

    @property
    def due_s(self) -> float | None: ...

    def add(self, piece: str) -> None: ...

    def paint(self) -> None: ...

    def say(self, status: str) -> None: ...

    def end(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Speed:
    """What the last reply took."""

    prompt: int | None  # tokens; None where the reply was stopped
    cached: int
    reply: int
    first_s: float
    reply_s: float  # from its first token on


class Quit(Exception):
    """The user wants to leave."""


class Talk:
    """A conversation with a model. Each line goes through `enter`; what a user is told beside replies goes to stderr."""

    def __init__(self, model: Model, sampling: Sampling, system: str, view: Callable[[], View], load_model: Callable[[str], Model]) -> None:
        self.model, self.sampling, self.system = model, sampling, system
        self.messages: list[Message] = []
        self.unanswered: Message | None = None  # failed, or stopped before the first word
        self._start = sampling
        self._dropped: tuple[list[Message], str] | None = None  # by the /clear or /load just made, with the system prompt of then
        self._speed: Speed | None = None
        self._view, self._load_model = view, load_model

    def enter(self, line: str) -> None:
        """A command, or a message to answer. Raises `HerdError` for what could not be done; then all is as it was. Raises `Quit`."""
        if not line.startswith("/") or "\n" in line.strip():
            if line.strip():
                self._answer(self.messages, parse(line))
            return
        name, _, rest = line[1:].strip().partition(" ")
        overwrite = name == "save!"
        if name.removesuffix("!" if overwrite else "") not in COMMANDS:
            hint = nearest(name, COMMANDS).replace("'", "") or "/help lists the commands"
            raise UsageError(f"there is no command /{clean(name)}", f"{hint}; a message that begins with / needs a space before it")
        if overwrite:
            self._save(rest.strip(), overwrite=True)
        else:
            getattr(self, f"_{name}")(rest.strip())

    def words(self, line: str) -> Iterable[str]:
        """Lines that begin so, for completion."""
        known = [f"/{name}{' ' if takes else ''}" for name, (takes, _) in COMMANDS.items()]
        known += [f"/set {field} " for field in FIELDS]
        return [word for word in known if word.startswith(line) and (line.startswith("/set ") or " " not in word.rstrip())]

    def _answer(self, history: Sequence[Message], asked: Message) -> None:
        """Ask and show the reply. The conversation changes when there is one; until then the message is kept aside."""
        self.unanswered = asked
        start = [Message(role="system", content=(self.system,))] if self.system else []
        try:
            with _stopping() as stopping:
                said, done = self._show(stopping, lambda: self.model.chat([*start, *history, asked], sampling=self.sampling))
        except ContextError as error:
            raise ContextError(
                f"this does not fit: {error.message}",
                "nothing is lost: /undo takes the last exchange back, /clear forgets all, /save keeps it, --context-tokens makes more room",
            ) from error
        if not said and done is None:
            _tell("stopped before the first word; /retry asks again")
            return
        self.messages = [*history, asked, Message(role="assistant", content=(said,) if said else ())]
        self.unanswered, self._dropped = None, None
        self._remark(done)

    def _show(self, stopping: Callable[[Reply], None], chat: Callable[[], Reply]) -> tuple[str, Done | None]:
        view, pieces = self._view(), list[str]()
        began = time.perf_counter()
        first = None
        stats = self.model.stats()
        computed = stats.computed_tokens if stats else 0
        reply = chat()
        stopping(reply)
        try:
            with suppress(StopIteration):
                while True:
                    piece = reply.next_within(view.due_s if pieces else _STATUS_S)
                    if piece:
                        first = first or time.perf_counter()
                        pieces.append(piece)
                        view.add(piece)
                    elif not pieces and (stats := self.model.stats()):
                        view.say(f"reading the prompt: {stats.computed_tokens - computed:,} tokens")
                    view.paint()
        finally:
            view.end()
            reply.close()
        said = "".join(pieces)
        ended = time.perf_counter()
        usage = reply.done.usage if reply.done else None
        tokens = usage.completion_tokens if usage else len(self.model.tokenizer.encode(said))
        first = first or ended
        cached = usage.cached_tokens if usage else 0
        self._speed = Speed(usage.prompt_tokens if usage else None, cached, tokens, first - began, ended - first)
        return said, reply.done

    def _remark(self, done: Done | None) -> None:
        """What the user should know of a reply that is not its own end, and of a context that is nearly full."""
        if done is None:
            _tell("stopped; what was said is kept")
            return
        room = self.model.thread.engine.context_tokens
        used = done.usage.prompt_tokens + done.usage.completion_tokens
        if done.reason == "length" and used >= room:
            _tell(f"the context of {room:,} tokens is full, which cut the reply; /undo or /clear makes room, --context-tokens more of it")
        elif done.reason == "length":
            _tell(f"cut after {done.usage.completion_tokens:,} tokens, as max_tokens says; /set max_tokens default lifts it")
        elif used >= _NEARLY_FULL * room:
            _tell(f"{used:,} of {room:,} tokens of the context are used")

    def _help(self, rest: str) -> None:
        takes_none("help", rest)
        lines = [f"  {f'/{name} {takes}':<26}{what}" for name, (takes, what) in COMMANDS.items()]
        lines += ['  @file.png, @"my file.png" attaches an image; Tab completes paths and commands', "  Ctrl-C stops a reply"]
        lines += ['  """ begins and ends a message of several lines, as does \\ at the end of each']
        _tell("\n".join(lines))

    def _system(self, rest: str) -> None:
        if rest:
            self.system = "" if rest == "none" else rest
        _tell(f"system: {clean(self.system)}" if self.system else "the model is told nothing first")

    def _set(self, rest: str) -> None:
        name, _, text = rest.partition(" ")
        if not name:
            _tell("\n".join(f"  {field:<20}{_shown(getattr(self.sampling, field))}" for field in FIELDS))
            return
        if name not in FIELDS:
            raise UsageError(f"there is no sampling field {clean(name)!r}", nearest(name, FIELDS) or f"there are: {', '.join(FIELDS)}")
        if text.strip():
            value = getattr(self._start, name) if text.strip() == "default" else read_value(name, text.strip())
            self.sampling = replace(self.sampling, **{name: value})
        _tell(f"  {name} is {_shown(getattr(self.sampling, name))}")

    def _undo(self, rest: str) -> None:
        takes_none("undo", rest)
        if self.unanswered:
            self.unanswered = None
            _tell("the message without a reply is forgotten")
        elif self._dropped:
            (self.messages, self.system), self._dropped = self._dropped, None
            _tell(f"back are {_count(self.messages)}")
        elif (start := self._last_asked()) is not None:
            self.messages = self.messages[:start]
            _tell(f"taken back; left are {_count(self.messages)}")
        else:
            raise UsageError("there is nothing to take back", "a conversation begins with a message")

    def _retry(self, rest: str) -> None:
        takes_none("retry", rest)
        start = self._last_asked()
        if self.unanswered:
            self._answer(self.messages, self.unanswered)
        elif start is None:
            raise UsageError("there is no message to answer again", "write one")
        else:
            asked, before = self.messages[start], self.messages
            try:
                self._answer(before[:start], asked)
            finally:
                if self.messages is before:  # no reply came: the one that there was still stands
                    self.unanswered = None

    def _last_asked(self) -> int | None:
        return next((i for i in reversed(range(len(self.messages))) if self.messages[i].role == "user"), None)

    def _clear(self, rest: str) -> None:
        takes_none("clear", rest)
        if self.messages:
            self._dropped = self.messages, self.system
        _tell(f"forgotten are {_count(self.messages)}{'; /undo brings them back' if self.messages else ''}")
        self.messages, self.unanswered = [], None

    def _save(self, rest: str, *, overwrite: bool = False) -> None:
        path = one_path("save", rest)
        start = [Message(role="system", content=(self.system,))] if self.system else []
        save(path, [*start, *self.messages], self.model.name, overwrite=overwrite)
        _tell(f"{_count(self.messages)} saved in {path}")

    def _load(self, rest: str) -> None:
        path = one_path("load", rest)
        messages = load(path)
        system = ""
        if messages and messages[0].role == "system":
            system, messages = messages[0].text, messages[1:]
        if self.messages:
            self._dropped = self.messages, self.system
        self.messages, self.system, self.unanswered = messages, system, None
        _tell(f"{_count(messages)} loaded from {path}{'; /undo brings back what was here' if self._dropped else ''}")

    def _model(self, rest: str) -> None:
        if rest:
            before = self.model
            before.unload()  # room for the other; it comes back by itself where that one cannot be loaded
            self.model = self._load_model(rest)
        _tell(f"{self.model.name}, with a context of {self.model.thread.engine.context_tokens:,} tokens")

    def _stats(self, rest: str) -> None:
        takes_none("stats", rest)
        if speed := self._speed:
            prompt = "" if speed.prompt is None else f"prompt {speed.prompt:,} tokens, {speed.cached:,} of them known before; "
            rate = f", {(speed.reply - 1) / speed.reply_s:.1f} a second" if speed.reply > 1 and speed.reply_s > 0 else ""
            _tell(f"last reply: {prompt}{speed.reply:,} tokens{rate}; the first after {speed.first_s * 1000:,.0f} ms")
        room = self.model.thread.engine.context_tokens
        start = [Message(role="system", content=(self.system,))] if self.system else []
        said = [*start, *self.messages]
        used = len(self.model.prompt(said).tokens) if said else 0
        _tell(f"context: {used:,} of {room:,} tokens used, {used / room:.0%}; {_count(self.messages)}")

    def _quit(self, rest: str) -> None:
        takes_none("quit", rest)
        raise Quit


@contextmanager
def _stopping() -> Iterator[Callable[[Reply], None]]:
    """Ctrl-C stops the reply that is handed over, and before there is one what is under way; keys typed meanwhile are not shown."""
    before = signal.getsignal(signal.SIGINT)
    held: list[Any] = []
    if sys.stdin.isatty():
        held = termios.tcgetattr(sys.stdin)
        quiet = [*held]
        quiet[3] &= ~termios.ECHO
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, quiet)

    def stopping(reply: Reply) -> None:
        signal.signal(signal.SIGINT, lambda *_: reply.stop())

    try:
        yield stopping
    finally:
        signal.signal(signal.SIGINT, before)
        if held:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, held)


def read_value(name: str, text: str) -> Any:
    """The value of a sampling field as a user writes it: JSON, or for `stop` a text. What may be is checked in `Sampling`."""
    try:
        value = json.loads(text)
    except ValueError:
        value = {"none": None, "None": None}.get(text, text)
    match name:
        case "stop":
            return tuple(value) if isinstance(value, list) else () if value is None else (str(value),)
        case "ignore_eos" if not isinstance(value, bool):
            raise UsageError(f"ignore_eos is {text}", "it is true or false")
        case "logit_bias" if isinstance(value, dict) and all(key.isdecimal() for key in value):
            return {int(key): bias for key, bias in value.items()}
    return value


def takes_none(name: str, rest: str) -> None:
    """Refuse words after a command that takes none. Raises `UsageError`."""
    if rest:
        raise UsageError(f"/{name} takes nothing, and got {clean(rest)!r:.60}", "a message that begins with / needs a space before it")


def one_path(name: str, rest: str) -> Path:
    """The path after a command, with or without quotes. Raises `UsageError`."""
    path = rest
    with suppress(ValueError):
        words = shlex.split(rest)
        path = words[0] if len(words) == 1 else rest  # a path with spaces needs no quotes: there is but one
    if not path:
        raise UsageError(f"/{name} needs a file", f"/{name} talk.json")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{clean(path)} does not exist: there is no such user", "give the path of a file") from error


def _shown(value: Any) -> str:
    if value is None:
        return "as the model's makers advise, or none"
    if isinstance(value, tuple | dict):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def _count(messages: Sequence[Message]) -> str:
    return f"{len(messages)} message{'' if len(messages) == 1 else 's'}"


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
