"""A reply on the screen while it comes. What is finished is printed once and scrolls away; below it the open part is repainted.

A frame is one write: where it only adds to the last line it is the added text, else the cursor goes up to the first line that differs and
writes from there, over what stands there, without erasing first, within the marks of a synchronized update where the terminal knows them.
The open part never has more rows than the screen, because rows that have left it cannot be reached again: of a higher one the end is shown,
and all of it once it is finished.
"""

import os
import time
from collections.abc import Callable, Sequence
from typing import TextIO

from rich.console import Console
from rich.text import Text

from herd.cli.terminal.blocks import Blocks, Unit
from herd.cli.terminal.clean import clean
from herd.cli.terminal.markdown import Renderer, ansi, rows_of

FRAME_S = 0.03  # between two frames at least
_SHARE = 4  # a frame that took t is followed by the next after this times t: painting must not take the processor from the model

Size = Callable[[], os.terminal_size]


class Screen:
    """The region that is repainted. The cursor stands behind its last line."""

    def __init__(self, out: TextIO, console: Console, size: Size) -> None:
        self._out, self._console, self._size = out, console, size
        self._shown: list[Text] = []
        self._written: list[str] = []  # the same as the terminal got it

    def paint(self, done: Sequence[Text], open_: Sequence[Text]) -> None:
        """Print `done` for good and show `open_` below it, in place of what was open."""
        columns, rows = self._size()
        region = _last_rows(open_, columns, rows - 1)
        lines = [*done, *region]
        written = [ansi(self._console, line) for line in lines]
        self._out.write(self._frame(lines, written, columns, rows) + ("" if region or not done else "\r\n"))
        self._out.flush()
        self._shown, self._written = region, written[len(done) :]

    def _frame(self, lines: list[Text], written: list[str], columns: int, rows: int) -> str:
        """What leads from the lines shown to these."""
        old = self._written
        if old == written or not old:
            return "" if old else "\r\n".join(written)
        last = len(old) - 1
        same = next((i for i, (was, line) in enumerate(zip(old, written, strict=False)) if was != line), min(len(old), len(written)))
        if same >= last and len(written) > last and written[last].startswith(old[last]):
            return "\r\n".join([written[last][len(old[last]) :], *written[last + 1 :]])
        first = max(min(same, last, len(lines) - 1), 0)  # the line to go up to; the cursor must end behind a line, so one is written again
        up = min(sum(rows_of(line, columns) for line in self._shown[first:]) - 1, rows - 1)
        parts = []
        for line, text in zip(lines[first:-1], written[first:-1], strict=True):
            parts.append(text + ("" if _is_full(line, columns) else "\x1b[K") + "\r\n")
        end = written[-1] if written else ""
        parts.append(f"\x1b[J{end}" if lines and _is_full(lines[-1], columns) else f"{end}\x1b[J")
        rise = f"\x1b[{up}A" if up else ""
        return f"{_BEGIN}\r{rise}{''.join(parts)}{_END}"


_BEGIN, _END = "\x1b[?2026h", "\x1b[?2026l"  # a synchronized update: the terminal shows all of it at once, or ignores the marks


def _is_full(line: Text, columns: int) -> bool:
    """Whether the line ends in the last cell of a row. The cursor then still is on that cell, and erasing would take it."""
    return line.cell_len > 0 and line.cell_len % columns == 0


def _last_rows(lines: Sequence[Text], columns: int, rows: int) -> list[Text]:
    """The last lines that fit into so many rows."""
    kept: list[Text] = []
    for line in reversed(lines):
        rows -= rows_of(line, columns)
        if rows < 0:
            if not kept:
                kept.append(line[-columns * max(rows + rows_of(line, columns) - 1, 1) :])
            break
        kept.append(line)
    return kept[::-1]


class Painted:
    """A reply as Markdown, painted as it comes."""

    def __init__(self, out: TextIO, console: Console, size: Size, clock: Callable[[], float] = time.perf_counter) -> None:
        self._renderer, self._screen = Renderer(console), Screen(out, console, size)
        self._size, self._clock = size, clock
        self._blocks, self._units = Blocks(), list[Unit]()
        self._due = 0.0
        self._dirty = False

    @property
    def due_s(self) -> float | None:
        """Seconds until there is something to paint; None: not before more has come."""
        return max(self._due - self._clock(), 0.0) if self._dirty else None

    def add(self, piece: str) -> None:
        self._units += self._blocks.feed(clean(piece).replace("\t", "    "))
        self._dirty = True

    def paint(self) -> None:
        """Bring the screen up to date, if it is time."""
        if not self._dirty or self._clock() < self._due:
            return
        started = self._clock()
        self._show(self._units, self._blocks.preview())
        self._units, self._dirty = [], False
        self._due = started + max(FRAME_S, _SHARE * (self._clock() - started))

    def say(self, status: str) -> None:
        """A passing word below all that is finished, until the reply has something to show."""
        self._screen.paint([], [Text(status, style="bright_black")] if status else [])

    def end(self) -> None:
        """Print what is left."""
        self._show([*self._units, *self._blocks.finish()], [])
        self._screen.paint([Text()], [])

    def _show(self, done: list[Unit], open_: list[Unit]) -> None:
        width = self._size().columns - 1
        self._screen.paint(*([line for unit in units for line in self._renderer.lines(unit, width)] for units in (done, open_)))


class Plain:
    """A reply as it is, for a pipe or a terminal that knows nothing but text."""

    due_s = None

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._last = ""

    def add(self, piece: str) -> None:
        piece = clean(piece)
        self._out.write(piece)
        self._out.flush()
        self._last = piece or self._last

    def paint(self) -> None:
        """Nothing waits."""

    def say(self, status: str) -> None:
        """Nothing passes: what is written stays."""

    def end(self) -> None:
        if not self._last.endswith("\n"):
            self._out.write("\n")
            self._out.flush()
