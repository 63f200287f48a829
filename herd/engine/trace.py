"""What an engine did, as a file that Perfetto (ui.perfetto.dev) and chrome://tracing open: steps and their parts, sequences, pages.

The file is a JSON array and whole at every moment: each write puts the closing bracket behind the new events, and the next one begins on
top of it. So whatever ends the process, the file can be parsed, and what is missing is at most the last second. Events are collected and
written together, about 64 KB at a time, or when an engine has nothing more to do.

When half of the limit is reached the file becomes NAME.1.json, in place of an older one, and a new one begins: what is there is always the
end of the story, and never more than the limit. Source: "Trace Event Format", Google, 2016; times are microseconds.
"""

import json
import os
import stat
import threading
import time
from collections.abc import Sequence as ListLike
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from herd.chat import ChatEvent, Done
from herd.engine.scheduler import Piece, Plan, Scheduler
from herd.engine.sequence import Sequence
from herd.engine.stats import Watch
from herd.errors import HerdError, UsageError
from herd.log import log

LIMIT_BYTES = 256 << 20
BUFFER_BYTES = 64 << 10
FLUSH_S = 1.0  # that events wait at most while steps go on
DECODE_NS = 1_000_000_000  # longest slice of decoding
_STEPS, _FIRST_SEQUENCE = 0, 1  # rows


class TraceFile:
    """The file, which several engines may write to."""

    def __init__(self, path: Path, *, limit_bytes: int = LIMIT_BYTES) -> None:
        """path: is written over.  limit_bytes: of it and of the one before it together. Raises `OSError` or `UsageError`."""
        self.path, self.limit_bytes = path, limit_bytes
        self.start = time.perf_counter()
        self.generation = 0  # of the file: names of rows are told once in each
        self._lock = threading.Lock()
        self._engines: dict[str, Trace] = {}
        self._descriptor = -1
        self._open()

    @property
    def previous(self) -> Path:
        """Where the file goes when it is full."""
        return self.path.with_name(f"{self.path.stem}.1{self.path.suffix}")

    def engine(self, name: str, clock_start: float | None = None) -> "Trace":
        """The rows of an engine; one that comes back after it was unloaded goes on in its own.

        clock_start: what the engine's clock showed when this file was begun, where that is not `time.perf_counter`.
        """
        with self._lock:
            if name not in self._engines:
                number = len(self._engines) + 1
                self._engines[name] = Trace(self, number, self.start if clock_start is None else clock_start)
                self._put([self._named(number, name)])
            return self._engines[name]

    def write(self, lines: list[str]) -> None:
        """Append events. What the system refuses ends the trace with one warning, and nothing else."""
        with self._lock:
            self._put(lines)
            if self._end > self.limit_bytes // 2:
                self._begin_anew()

    def close(self) -> None:
        with self._lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1

    def _open(self) -> None:
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            os.close(self._descriptor)
            raise UsageError(f"a trace cannot be written to {self.path}: it is no plain file", "name a file", param="trace")
        self._end = os.pwrite(self._descriptor, b"[\n\n]\n", 0) - 3
        self._is_empty = True

    def _put(self, lines: list[str]) -> None:
        if self._descriptor < 0 or not lines:
            return
        data = ("" if self._is_empty else ",\n") + ",\n".join(lines)
        encoded = data.encode()
        try:
            written = os.pwrite(self._descriptor, encoded + b"\n]\n", self._end)
            if written != len(encoded) + 3:
                raise OSError(0, f"{written} of {len(encoded) + 3} bytes were taken")
        except OSError as error:
            log.warning("the trace %s ends here: %s", self.path, error.strerror)
            with suppress(OSError):
                os.ftruncate(self._descriptor, self._end)
                os.pwrite(self._descriptor, b"\n]\n", self._end)
            os.close(self._descriptor)
            self._descriptor = -1
            return
        self._end += len(encoded)
        self._is_empty = False

    def _begin_anew(self) -> None:
        os.close(self._descriptor)
        try:
            self.path.replace(self.previous)
            self._open()
        except OSError as error:
            log.warning("the trace %s ends here: %s", self.path, error.strerror)
            self._descriptor = -1
            return
        self.generation += 1
        self._put([self._named(i, name) for i, name in enumerate(self._engines, start=1)])

    @staticmethod
    def _named(engine: int, name: str) -> str:
        about = {"ph": "M", "pid": engine, "tid": _STEPS}
        events = ({**about, "name": kind, "args": {"name": given}} for kind, given in (("process_name", name), ("thread_name", "steps")))
        return ",\n".join(map(json.dumps, events))


@dataclass(eq=False, slots=True)
class Row:
    """What of a sequence has not been written yet. Times are ns since the file was begun."""

    tid: int
    generation: int = -1  # of the file in which the row has a name
    last_step: int = -1
    last_end: int = 0
    since: int = 0  # decoding; with no token yet: not
    tokens: int = 0
    steps: int = 0
    drafted: int = 0


def _parts(marks: list[int]) -> list[float]:
    """Start and length of each part, in microseconds."""
    return [number / 1000 for start, stop in pairwise(marks) for number in (start, stop - start)]


class Trace:
    """One engine's part of the file. Called by the thread that steps the engine."""

    def __init__(self, file: TraceFile, engine: int, clock_start: float) -> None:
        self.file, self.engine, self.clock_start = file, engine, clock_start
        self._lines: list[str] = []
        self._num_bytes = 0
        self._flushed_at = 0
        self._next_tid = _FIRST_SEQUENCE
        self._counted: dict[str, tuple[int, ...]] = {}
        place = f'{{"ph":"X","pid":{engine},"tid":{_STEPS},"ts":%.3f,"dur":%.3f,"name":'
        parts = (f'{place}"{part}","args":{{}}}}' for part in Watch().seconds)
        self._step = ",\n".join((f'{place}"step","args":{{%s}}}}', *parts))  # a step and its parts, all numbers at once

    def step(
        self,
        scheduler: Scheduler,
        watch: Watch,
        plan: Plan,
        tokens: ListLike[list[int] | HerdError],
        events: ListLike[tuple[Sequence, ChatEvent | HerdError]],
    ) -> None:
        """Note a step that has just ended. tokens: drawn for each due piece of the plan."""
        start = self.clock_start
        marks = [round((mark - start) * 1e9) for mark in watch.marks]
        begin, end, number = marks[0], marks[-1], watch.num_steps
        prompt_tokens = sum(piece.stop - piece.start for piece in plan.prompts)
        about = f'"step":{number},"sequences":{len(plan.pieces)},"prompt_tokens":{prompt_tokens},"rows":{len(tokens)}'
        self._add(self._step % (begin / 1000, (end - begin) / 1000, about, *_parts(marks)))
        drawn = iter(tokens)
        for piece in plan.pieces:
            self._piece(piece, next(drawn) if piece.num_rows else [], begin, end, number)
        for sequence, event in events:
            if isinstance(event, Done):
                usage = event.usage
                about = f'"reason":"{event.reason}","prompt_tokens":{usage.prompt_tokens},"completion_tokens":{usage.completion_tokens}'
                self._ended(sequence, end, "end", f'{about},"cached_tokens":{usage.cached_tokens}')
            elif isinstance(event, HerdError):
                self._ended(sequence, end, "failed", f'"error":{json.dumps(event.message)}')
        pages = scheduler.pages
        for name, pool, is_there in (("global pages", pages.full, pages.has_full), ("local pages", pages.local, pages.has_local)):
            if is_there:
                kept, free = len(pool.kept), len(pool.free)
                self._count(name, end, '"used":%d,"cached":%d,"free":%d', (pool.num_pages - kept - free, kept, free))
        self._count("sequences", end, '"running":%d,"waiting":%d', (len(scheduler.running), len(scheduler.waiting)))
        if self._num_bytes > BUFFER_BYTES or end - self._flushed_at > FLUSH_S * 1e9 or scheduler.is_idle:
            self.flush()
            self._flushed_at = end

    def aborted(self, sequence: Sequence, now: float) -> None:
        """A sequence was taken away before its end. now: by the engine's clock."""
        if sequence.row is not None:
            self._ended(sequence, self._ns(now), "aborted", f'"completion_tokens":{len(sequence.tokens) - sequence.num_prompt}')

    def flush(self) -> None:
        """Write what is only noted yet."""
        self.file.write(self._lines)
        self._lines.clear()
        self._num_bytes = 0

    def _piece(self, piece: Piece, drawn: list[int] | HerdError, begin: int, end: int, number: int) -> None:
        sequence = piece.sequence
        row = sequence.row or self._new_row(sequence, begin)
        if row.generation != self.file.generation:
            self._name(sequence, row)
        if row.last_step not in (-1, number - 1):  # it gave way, or had no room in the steps between
            self._decoded(row)
            self._slice("waiting", row.tid, row.last_end, begin, f'"tokens":{len(sequence.tokens)}')
        row.last_step, row.last_end = number, end
        if piece.start < sequence.num_prompt:
            about = f'"from":{piece.start},"to":{piece.stop},"prompt_tokens":{sequence.num_prompt},"cached_tokens":{sequence.num_cached}'
            self._slice("prefill", row.tid, begin, end, about)
            return
        if not row.steps:
            row.since = begin
        row.steps += 1
        row.drafted += len(piece.drafts)
        row.tokens += len(drawn) if isinstance(drawn, list) else 0
        if end - row.since > DECODE_NS:
            self._decoded(row)

    def _new_row(self, sequence: Sequence, begin: int) -> Row:
        row = sequence.row = Row(self._next_tid)
        self._next_tid += 1
        self._name(sequence, row)
        arrived = self._ns(sequence.arrived)
        self._slice("queued", row.tid, min(arrived, begin), begin, f'"prompt_tokens":{sequence.num_prompt}')
        return row

    def _name(self, sequence: Sequence, row: Row) -> None:
        row.generation = self.file.generation
        name = f"sequence {row.tid}: {sequence.num_prompt} tokens"
        self._add(f'{{"ph":"M","pid":{self.engine},"tid":{row.tid},"name":"thread_name","args":{{"name":"{name}"}}}}')
        self._add(f'{{"ph":"M","pid":{self.engine},"tid":{row.tid},"name":"thread_sort_index","args":{{"sort_index":{row.tid}}}}}')

    def _ended(self, sequence: Sequence, now: int, how: str, about: str) -> None:
        row: Row | None = sequence.row
        if row is None:
            return
        self._decoded(row)
        self._add(f'{{"ph":"i","s":"t","pid":{self.engine},"tid":{row.tid},"ts":{now / 1000:.3f},"name":"{how}","args":{{{about}}}}}')
        sequence.row = None

    def _decoded(self, row: Row) -> None:
        """Write the slice of decoding that is under way."""
        if row.steps:
            about = f'"tokens":{row.tokens},"steps":{row.steps},"drafted":{row.drafted},"accepted":{row.tokens - row.steps}'
            self._slice("decode", row.tid, row.since, row.last_end, about)
            row.tokens = row.steps = row.drafted = 0

    def _slice(self, name: str, tid: int, start: int, stop: int, about: str = "") -> None:
        place = f'"pid":{self.engine},"tid":{tid},"ts":{start / 1000:.3f},"dur":{(stop - start) / 1000:.3f}'
        self._add(f'{{"ph":"X",{place},"name":"{name}","args":{{{about}}}}}')

    def _count(self, name: str, now: int, form: str, values: tuple[int, ...]) -> None:
        if self._counted.get(name) != values:
            self._counted[name] = values
            self._add(f'{{"ph":"C","pid":{self.engine},"ts":{now / 1000:.3f},"name":"{name}","args":{{{form % values}}}}}')

    def _add(self, line: str) -> None:
        self._lines.append(line)
        self._num_bytes += len(line)

    def _ns(self, seconds: float) -> int:
        return round((seconds - self.clock_start) * 1e9)
