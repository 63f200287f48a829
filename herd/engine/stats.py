"""What an engine holds and has done, as plain numbers, for metrics and logs."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from herd.engine.disk import DiskStats
from herd.engine.pages import PagePool


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolStats:
    """The pages of one kind of layer."""

    used: int  # held by sequences
    cached: int  # kept for what is in them, held by nobody
    free: int
    evicted: int  # ever: kept, and then taken for something else

    @staticmethod
    def of(pool: PagePool) -> "PoolStats":
        return PoolStats(used=pool.num_pages - pool.room, cached=len(pool.kept), free=len(pool.free), evicted=pool.num_evicted)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stats:
    """A moment of an engine; what is counted is counted since it was made."""

    num_waiting: int  # sequences in the queue
    num_running: int
    num_finished: dict[str, int]  # by why: stop, length
    num_aborted: int  # taken away before their end
    num_failed: int  # ended by an error
    num_preempted: int  # times that a sequence gave its pages up for others, to go on later
    prompt_tokens: int  # of the prompts that have been read, what was taken over included
    generated_tokens: int
    computed_tokens: int  # that went through the model: of prompts, of replies, and guesses
    full_pages: PoolStats  # of global layers
    local_pages: PoolStats
    hit_tokens: int  # taken over from the cache and not computed
    restored_tokens: int  # read back from the disk into the cache
    disk: DiskStats | None  # None where nothing is stored
    drafted_tokens: int  # tokens that were tested ahead: guesses, and what grammars force
    accepted_tokens: int  # those that were right
    num_steps: int
    seconds: dict[str, float]  # by part of a step: plan, see, run, sample, accept


@dataclass(eq=False, kw_only=True, slots=True)
class Tally:
    """What the scheduler counts as it goes; `Stats` has the meanings."""

    finished: Counter[str] = field(default_factory=lambda: Counter(stop=0, length=0))
    aborted: int = 0
    failed: int = 0
    preempted: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    computed_tokens: int = 0
    hit_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(eq=False, slots=True)
class Watch:
    """Adds up where time goes, lap by lap."""

    clock: Callable[[], float] = time.perf_counter  # seconds, from anywhere
    num_steps: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("plan", "see", "run", "sample", "accept"), 0.0))
    marks: list[float] = field(default_factory=list)  # of the last step: its start, and the ends of its parts

    def start(self) -> None:
        """A step begins."""
        self.num_steps += 1
        self.marks = [self.clock()]

    def lap(self, part: str) -> float:
        """A part of it ends; its seconds."""
        self.marks.append(self.clock())
        seconds = self.marks[-1] - self.marks[-2]
        self.seconds[part] += seconds
        return seconds
