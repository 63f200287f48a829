"""Markdown as it comes, cut into units that nothing to come can change: they are printed once and stay.

Only the last block of complete lines can still change, so all before it are finished: CommonMark is parsed by lines, and a line can end,
continue or turn into something else the open block alone. (Not so with link definitions, which reach back; they are left as text.) A long
list or a long piece of code would stay open for long, so an item is a unit, and each line of code. How a text is cut into pieces on its
way makes no difference to the units: they depend on complete lines only.
"""

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token

CONTEXT_LINES = 100  # of code before a line that are looked at for its colours

_OPENS = re.compile(r"( {0,3})(`{3,}(?=[^`]*$)|~{3,})(.*)")
_MARKS_ALONE = re.compile(r"[-=*+#>`~_|: \t]*|[ \t]*\d{1,9}[.)]?[ \t]*")  # a line that is not known yet for what it will be
_MATHS = re.compile(r"\\\((.+?)\\\)|\\\[(.+?)\\\]|\$\$(.+?)\$\$", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Unit:
    """A part of a text that is shown on its own."""

    kind: Literal["markdown", "fence", "code"]
    text: str  # Markdown of one block or item; the line of a fence; one line of code
    gap: bool  # whether a blank line stands before it
    language: str = ""  # of code
    before: tuple[str, ...] = ()  # lines of code before this one


def _maths(state: StateInline, silent: bool) -> bool:
    """Maths is shown as its source: the backslashes and stars in it mean no Markdown."""
    match = _MATHS.match(state.src, state.pos)
    if not match:
        return False
    if not silent:
        state.push("text", "", 0).content = match[0]
    state.pos = match.end()
    return True


def make_parser() -> MarkdownIt:
    """CommonMark with tables and strikethrough. HTML is text: a terminal shows none, and what is said must not vanish."""
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    parser.disable(["html_block", "html_inline", "reference"])
    parser.inline.ruler.before("escape", "maths", _maths)
    return parser


PARSER = make_parser()


class Blocks:
    """Feed pieces of text, get the units that they finish."""

    def __init__(self) -> None:
        self._rest = ""  # not in a unit yet
        self._fence = ""  # that closes the code we are in
        self._indent = 0  # of that fence
        self._language = ""
        self._code: tuple[str, ...] = ()  # its last lines
        self._gap = False  # before the next unit
        self._open_list = False  # the next unit is an item of the list that the last one is of

    def feed(self, text: str) -> list[Unit]:
        """The units that are finished now."""
        self._rest += text
        return list(self._drain()) if "\n" in text else []

    def finish(self) -> list[Unit]:
        """All that is left, when nothing more will come."""
        if self._rest and not self._rest.endswith("\n"):
            self._rest += "\n"
        units = list(self._drain())
        if self._rest.strip():
            units.append(self._unit(self._rest.rstrip("\n")))
        self._rest = ""
        return units

    def preview(self) -> list[Unit]:
        """What is open, as it looks now. Marks that may become anything are held back, and bold and code are closed."""
        ahead = copy.copy(self)
        head, newline, last = self._rest.rpartition("\n")
        if self._fence:
            ahead._rest = "" if last.strip() and not last.strip().strip(self._fence[0]) else last
        else:
            ahead._rest = head + newline + ("" if _MARKS_ALONE.fullmatch(last) else closed(last))
        return ahead.finish()

    def _drain(self) -> Iterator[Unit]:
        while True:
            if self._fence:
                line, newline, rest = self._rest.partition("\n")
                if not newline:
                    return
                self._rest = rest
                yield self._code_line(line)
                continue
            self._rest = re.sub(r"\A(?:[ \t]*\n)+", "", self._rest)
            line, newline, rest = self._rest.partition("\n")
            if newline and (opens := _OPENS.fullmatch(line)):
                self._rest, self._open_list = rest, False
                self._indent, self._fence, self._language = len(opens[1]), opens[2], _first_word(opens[3])
                yield Unit("fence", line.strip(), self._gap)
                self._gap = False
                continue
            end = self._first_end()
            if not end:
                return
            lines = self._rest.split("\n")
            self._rest = "\n".join(lines[end:])
            yield self._unit("\n".join(lines[:end]).rstrip("\n"), blank_after=not lines[end - 1].strip())

    def _unit(self, text: str, *, blank_after: bool = True) -> Unit:
        unit = Unit("markdown", text, self._gap)
        self._gap = blank_after if self._open_list else True
        return unit

    def _code_line(self, line: str) -> Unit:
        mark = self._fence
        if re.fullmatch(rf" {{0,3}}{re.escape(mark[0])}{{{len(mark)},}}[ \t]*", line):
            self._fence, self._code, self._gap = "", (), True
            return Unit("fence", line.strip(), False)
        line = re.sub(rf"\A {{0,{self._indent}}}", "", line)
        unit = Unit("code", line, False, self._language, self._code)
        self._code = (*self._code, line)[-CONTEXT_LINES:]
        return unit

    def _first_end(self) -> int:
        """The line at which the first unit ends, 0 while it is open."""
        complete = self._rest[: self._rest.rfind("\n") + 1]
        if not complete:
            return 0
        tokens = PARSER.parse(complete)
        starts = _starts(tokens, 0)
        if not starts:
            return 0
        if tokens[0].type in ("bullet_list_open", "ordered_list_open"):
            items = _starts(tokens[: _closing(tokens)], 1)
            if len(items) > 1:
                self._open_list = True
                return items[1]
        if len(starts) > 1:
            self._open_list = False
            return starts[1]
        return 0


def _starts(tokens: list[Token], level: int) -> list[int]:
    return [token.map[0] for token in tokens if token.level == level and token.nesting >= 0 and token.map]


def _closing(tokens: list[Token]) -> int:
    return next(i for i, token in enumerate(tokens) if i and token.level == 0)


def _first_word(info: str) -> str:
    return info.strip().partition(" ")[0].strip("{}.").lower()


def closed(line: str) -> str:
    """The line with the code or the bold closed that is open at its end, for the time being."""
    if line.count("`") % 2:
        return line if line.endswith("`") else f"{line}`"
    outside = re.sub(r"`[^`]*`", "", line)
    if outside.count("**") % 2 and not outside.rstrip().endswith("*"):
        return f"{line.rstrip()}**"
    return line
