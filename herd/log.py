"""Where herd's words go: the standard `herd` logger and one progress bar, both to stderr. Data alone goes to stdout."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

log = logging.getLogger("herd")


_CONTROL = {code: f"\\x{code:02x}" for code in (*range(9), *range(11, 32), *range(127, 160))}  # tab and newline stay


class _Plain(logging.Formatter):
    """What comes from outside cannot colour a terminal, move its cursor or wipe a line."""

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).translate(_CONTROL)


def show_logs(level: int = logging.INFO) -> None:
    """Send herd's log to stderr; the command line calls this once, a library user decides for himself."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Plain("%(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(level)
    log.propagate = False


class Bar(Protocol):
    """What long work reports to."""

    def advance(self, amount: float) -> None: ...


class _Silent:
    def advance(self, amount: float) -> None:
        del amount


@contextmanager
def progress(what: str, total: float, *, unit: str = "B") -> Iterator[Bar]:
    """A progress bar on stderr with rate and time left; one plain line at the start and at the end when stderr is no terminal.

    total: the amount of work; unit "B" prints bytes, anything else plain counts. Silent when the herd logger is not shown.
    """
    if not log.isEnabledFor(logging.INFO) or not log.handlers:
        yield _Silent()
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        log.info("%s ...", what)
        yield _Silent()
        log.info("%s: done", what)
        return
    amount = DownloadColumn() if unit == "B" else MofNCompleteColumn()
    with Progress(TextColumn("{task.description}"), BarColumn(), amount, TimeRemainingColumn(), console=console) as shown:
        task = shown.add_task(what, total=total)

        class _Shown:
            def advance(self, amount: float) -> None:
                shown.advance(task, amount)

        yield _Shown()
