"""Python's literals and JSON to JSON, read character by character: the arguments of calls, in whichever form a model writes them.

Each method is a generator that takes characters with `yield`; what is certain is added to `json`. A number or a word ends where something
else begins, and that character is given back by way of `back`: whoever sends characters must send it again.
"""

import json
import re
from collections.abc import Generator

MOST_DEPTH = 64  # of lists and objects
NUMBER_CHARS = 1 << 12
NAME_CHARS = 64
SPACES = " \t\r\n"

Step = Generator[None, str, str]  # reads characters; gives a string
_WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "\\": "\\", "'": "'", '"': '"', "/": "/", "\n": ""}
_JSON_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_PYTHON_INT = re.compile(r"[+-]?(0(_?0)*|[1-9](_?[0-9])*)")
_PYTHON_FLOAT = re.compile(r"(?=.*[.eE])[+-]?([0-9](_?[0-9])*\.?([0-9](_?[0-9])*)?|\.[0-9](_?[0-9])*)([eE][+-]?[0-9](_?[0-9])*)?")


class BrokenError(Exception):
    """What has been read is not what it began as."""


class Literals:
    """A reader of values."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget what has been read."""
        self.json = ""  # what has been read, as JSON
        self.back = ""  # a character that was read and is to come again
        self._depth = 0

    def value(self, char: str) -> Step:
        if char in "\"'":
            yield from self._string(char)
        elif char == "[":
            yield from self._array()
        elif char == "{":
            yield from self.object(char)
        elif char.isdecimal() or char in "+-.":
            number = yield from self._number(char)
            self.json += number  # not in one statement: `json` may be taken away while the number is read
        else:
            word, self.back = yield from self.name(char)
            if word not in _WORDS:
                raise BrokenError
            self.json += _WORDS[word]
        return ""

    def _array(self) -> Step:
        """After "["."""
        self._down()
        self.json += "["
        is_first, char = True, (yield from self.space())
        while char != "]":
            self.json += "" if is_first else ", "
            yield from self.value(char)
            is_first, char = False, (yield from self.comma("]"))
        self.json += "]"
        self._depth -= 1
        return ""

    def object(self, char: str) -> Step:
        """At "{"."""
        if char != "{":
            raise BrokenError
        self._down()
        self.json += "{"
        is_first, char = True, (yield from self.space())
        while char != "}":
            self.json += "" if is_first else ", "
            if char in "\"'":
                yield from self._string(char)
            else:
                number = yield from self._number(char)
                self.json += f'"{number}"'
            self.json += ": "
            yield from self.literal(":", (yield from self.space()))
            yield from self.value((yield from self.space()))
            is_first, char = False, (yield from self.comma("}"))
        self.json += "}"
        self._depth -= 1
        return ""

    def _down(self) -> None:
        self._depth += 1
        if self._depth > MOST_DEPTH:
            raise BrokenError

    def _number(self, char: str) -> Step:
        text = ""
        while char.isalnum() or char in "+-._":
            text += char
            char = yield
            if len(text) > NUMBER_CHARS:
                raise BrokenError
        self.back = char
        if _JSON_NUMBER.fullmatch(text):
            return text
        if _PYTHON_INT.fullmatch(text):
            return str(int(text))
        if _PYTHON_FLOAT.fullmatch(text) and abs(float(text)) != float("inf"):
            return repr(float(text))
        raise BrokenError

    def _string(self, quote: str) -> Step:
        """After the first quote. Line breaks may stand in any string: models write them."""
        self.json += '"'
        char = yield
        end = quote
        if char == quote:
            char = yield
            if char != quote:
                self.back = char
                self.json += '"'
                return ""
            end, char = 3 * quote, (yield)
        while True:
            if char == "\\":
                escaped = yield from self._escape((yield))
                self.json += escaped
            elif char != quote:
                self.json += char if char >= " " and char != '"' else json.dumps(char)[1:-1]
            elif len(end) == 1:
                break
            else:
                run = 1
                while run < 3 and (char := (yield)) == quote:
                    run += 1
                if run == 3:
                    break
                self.json += run * json.dumps(quote)[1:-1]
                continue
            char = yield
        self.json += '"'
        return ""

    def _escape(self, char: str) -> Step:
        """After a backslash. An escape that means nothing is kept, as Python does."""
        if char in "xuU":
            digits = ""
            for _ in range({"x": 2, "u": 4, "U": 8}[char]):
                digits += yield
            if not all(digit in "0123456789abcdefABCDEF" for digit in digits) or int(digits, 16) > 0x10FFFF:
                raise BrokenError
            return f"\\u{digits.lower()}" if 0xD800 <= int(digits, 16) < 0xE000 else _quoted(int(digits, 16))
        if char in "01234567":
            number = char
            while len(number) < 3 and (char := (yield)) in "01234567":
                number += char
            if len(number) < 3 or char not in "01234567":
                self.back = char
            return _quoted(int(number, 8))
        if char not in _ESCAPES:
            return "\\\\" + json.dumps(char, ensure_ascii=False)[1:-1]
        return json.dumps(_ESCAPES[char])[1:-1]

    def name(self, char: str) -> Generator[None, str, tuple[str, str]]:
        """A name, and the character after it."""
        text = ""
        while char.isalnum() or char in "_-.$":
            text += char
            char = yield
            if len(text) > NAME_CHARS:
                raise BrokenError
        return text, char

    def space(self, char: str = " ") -> Step:
        """The first character from `char` on that is no white space."""
        while char in SPACES:
            char = yield
        return char

    def comma(self, end: str) -> Step:
        """What follows an item of a list: its end, or what comes after a comma, which may be the end too."""
        char = yield from self.space()
        if char == ",":
            return (yield from self.space())
        if char != end:
            raise BrokenError
        return char

    def literal(self, text: str, char: str = "") -> Step:
        for expected in text:
            if (char or (yield)) != expected:
                raise BrokenError
            char = ""
        return ""

    def short_string(self, char: str) -> Step:
        """A string without escapes: a key or a name."""
        if char != '"':
            raise BrokenError
        text = ""
        while (char := (yield)) != '"':
            text += char
            if char in "\\\n" or len(text) > NAME_CHARS:
                raise BrokenError
        return text


def _quoted(code: int) -> str:
    return json.dumps(chr(code), ensure_ascii=False)[1:-1]
