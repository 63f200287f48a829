"""Who is computed next. Decoding sequences first, one token each; prefill gets the rest of the step, in order of arrival.

Pages are taken when a piece is planned. When they run out, the sequence that arrived last gives its own up and goes back to the queue;
its tokens are kept and computed again later, so nothing that a reader saw is lost. The one that arrived first therefore always gets on,
and since a sequence that could never fit is refused at the door, every sequence ends.
"""

from collections import deque
from dataclasses import dataclass, field

from herd.chat import ChatEvent
from herd.engine.config import EngineConfig
from herd.engine.pages import Pages
from herd.engine.sequence import Sequence
from herd.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens [start, stop) of a sequence, all within one chunk."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def is_due(self) -> bool:
        """Whether the last token is the sequence's last, so that its logits give the next one."""
        return self.stop == len(self.sequence.tokens)


@dataclass(frozen=True, slots=True)
class Plan:
    """The work of one step."""

    pieces: list[Piece] = field(default_factory=list)

    @property
    def due(self) -> list[Sequence]:
        """Sequences that get a token from this step, in packed order."""
        return [piece.sequence for piece in self.pieces if piece.is_due]


class Scheduler:
    """The queue, the running sequences, and their pages."""

    def __init__(self, model: ModelConfig, config: EngineConfig, pages: Pages) -> None:
        self.config, self.pages = config, pages
        self.chunk_tokens = model.chunk_tokens
        self.has_local, self.has_full = bool(model.local_layers), bool(model.global_layers)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of arrival

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.running

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is, and free its pages; one that has ended is already forgotten."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._drop_pages(sequence)

    def next(self) -> Plan:
        """Plan a step. Empty only when idle."""
        plan = Plan()
        budget = self.config.step_tokens
        decoding = [s for s in self.running if s.num_waiting == 1]
        prefilling = [s for s in self.running if s.num_waiting > 1]
        for sequence in decoding + prefilling:
            if sequence in self.running and budget:  # it may have been put back to make room
                budget -= self._plan(plan, sequence, budget)
        while self.waiting and budget and len(self.running) < self.config.max_sequences and self._has_room(self.waiting[0]):
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            budget -= self._plan(plan, sequence, budget)
        return plan

    def accept(self, plan: Plan, tokens: list[int]) -> list[tuple[Sequence, ChatEvent]]:
        """Record that `plan` was computed and that its due sequences drew `tokens`; say what their readers get."""
        for piece in plan.pieces:
            piece.sequence.num_computed = piece.stop
        events = []
        for sequence, token in zip(plan.due, tokens, strict=True):
            events += [(sequence, event) for event in sequence.accept(token)]
            if sequence.finish:
                self.remove(sequence)
        return events

    def _plan(self, plan: Plan, sequence: Sequence, budget: int) -> int:
        """Add the next piece of `sequence` to the plan and give it pages; returns its tokens, 0 if it had to go back itself."""
        start = sequence.num_computed
        stop = min(len(sequence.tokens), start + budget)
        chunk_start = 0
        if self.chunk_tokens is not None:
            chunk_start = start // self.chunk_tokens * self.chunk_tokens
            stop = min(stop, chunk_start + self.chunk_tokens)
        if start == chunk_start:  # no later token of a local layer looks back across this border
            self.pages.local.give_back(sequence.local_table)
        while not self._grow(sequence, stop, stop - chunk_start):
            victim = self.running[-1]
            self._put_back(victim)
            plan.pieces[:] = [piece for piece in plan.pieces if piece.sequence is not victim]
            if victim is sequence:
                return 0
        plan.pieces.append(Piece(sequence, start, stop))
        return stop - start

    def _grow(self, sequence: Sequence, full_tokens: int, local_tokens: int) -> bool:
        """Make the tables hold that many tokens; False, with nothing changed, when there are not enough free pages."""
        size = self.pages.page_tokens
        full = -(-full_tokens // size) - len(sequence.full_table) if self.has_full else 0
        local = -(-local_tokens // size) - len(sequence.local_table) if self.has_local else 0
        if full > len(self.pages.full.free) or local > len(self.pages.local.free):
            return False
        sequence.full_table += self.pages.full.take(full)
        sequence.local_table += self.pages.local.take(local)
        return True

    def _has_room(self, sequence: Sequence) -> bool:
        """Whether the whole of a waiting sequence would fit now; admitting less would only make others give way."""
        size = self.pages.page_tokens
        length = len(sequence.tokens)
        local = min(length, self.chunk_tokens or length)
        return not (
            (self.has_full and -(-length // size) > len(self.pages.full.free))
            or (self.has_local and -(-local // size) > len(self.pages.local.free))
        )

    def _put_back(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._drop_pages(sequence)
        self.waiting.appendleft(sequence)

    def _drop_pages(self, sequence: Sequence) -> None:
        self.pages.full.give_back(sequence.full_table)
        self.pages.local.give_back(sequence.local_table)
        sequence.num_computed = 0
