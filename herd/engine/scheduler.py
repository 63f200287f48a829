"""Who is computed next. Decoding sequences first, one token each; prompts get the rest of the step, or what the pace allows, if it does.

Of several prompts the one that arrived first gets half, and the others the rest, the shortest first: a long prompt holds up no short one,
and short ones do not starve it. A prompt whose next page is being computed for another waits for it.

Pages are taken when a piece is planned, and before that taken over where another sequence has computed the same. When they run out, the
sequence that arrived last gives its own up and goes back to the queue. Its tokens are kept, and of its pages those that nobody needed
meanwhile; the rest is computed again later, so nothing that a reader saw is lost. The one that arrived first therefore always gets on, and
since a sequence that could never fit is refused at the door, every sequence ends.

Sequences in the background count as arrived after all others, in the queue and among the running, and give way to one that waits. Beside
others that decode they are paid for as prompts are, decoding or not, once no prompt of the others is left: so the pace holds against them
too, and they get on in what it leaves. With nobody else there they are computed as any.
"""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from herd.chat import ChatEvent
from herd.engine.config import EngineConfig
from herd.engine.pace import Pace
from herd.engine.pages import Pages
from herd.engine.payoff import Payoff
from herd.engine.sequence import Sequence
from herd.engine.shelf import Shelf
from herd.engine.stats import Tally
from herd.errors import HerdError


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens [start, stop) of a sequence, all within one chunk. The last may be drafts, which are not the sequence's yet."""

    sequence: Sequence
    start: int
    stop: int
    num_rows: int  # of the last tokens that give logits: none, or the sequence's last and all drafts
    drafts: list[int] = field(default_factory=list)
    num_guesses: int = 0  # drafts that were guessed from what the sequence has said; others its grammar forces

    @property
    def tokens(self) -> list[int]:
        return [*self.sequence.tokens[self.start : self.stop], *self.drafts]

    @property
    def is_decoding(self) -> bool:
        return self.num_rows == self.stop - self.start


@dataclass(frozen=True, slots=True)
class Plan:
    """The work of one step."""

    pieces: list[Piece] = field(default_factory=list)
    under_way: set[bytes] = field(default_factory=set)  # keys of the pages that it computes for prompts

    @property
    def due(self) -> list[Piece]:
        """The pieces that give their sequences tokens, in packed order."""
        return [piece for piece in self.pieces if piece.num_rows]

    @property
    def prompts(self) -> list[Piece]:
        """The pieces of sequences that do not decode yet."""
        return [piece for piece in self.pieces if not piece.is_decoding]

    @property
    def num_tokens(self) -> int:
        return sum(piece.stop - piece.start for piece in self.pieces)


class Scheduler:
    """The queue, the running sequences, and their pages."""

    def __init__(self, config: EngineConfig, pages: Pages, shelf: Shelf | None = None) -> None:
        self.config, self.pages, self.shelf = config, pages, shelf
        self.pace, self.payoff = Pace(config.pace), Payoff()
        self.tally = Tally()
        self.waiting: deque[Sequence] = deque()  # this and the next in order of arrival, those in the background behind the others
        self.running: list[Sequence] = []

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.running

    def add(self, sequence: Sequence) -> None:
        self.waiting.insert(len(self.waiting) if sequence.background else _num_front(self.waiting), sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence away before its end, wherever it is, and free its pages; one that has ended is already forgotten."""
        self.tally.aborted += self._forget(sequence)

    def _forget(self, sequence: Sequence) -> bool:
        """Whether there was something to forget."""
        found = sequence in self.running
        if found:
            self.running.remove(sequence)
        elif found := sequence in self.waiting:
            self.waiting.remove(sequence)
        self.pages.release(sequence)
        return found

    def next(self) -> Plan:
        """Plan a step. Empty only when idle."""
        plan = Plan()
        left = self.config.step_tokens
        self._let_in()
        front = [s for s in self.running if not s.background] or self.running.copy()
        decoding = [s for s in front if s.num_waiting == 1]
        for others_left, sequence in zip(reversed(range(len(decoding))), decoding, strict=True):
            left -= self._plan(plan, sequence, max(min(left, 1), left - others_left), len(decoding) - 1)
        self._plan_prompts(plan, left, [s for s in front if s.num_waiting > 1] or self.running[len(front) :])
        return plan

    def _let_in(self) -> None:
        """Let the queue's first ones run, as far as there is room; for one of the foreground, those in the background make some."""
        while self.waiting:
            first = self.waiting[0]
            if len(self.running) < self.config.max_sequences and self._admit(first):
                continue
            if first.background or not self.running or not self.running[-1].background:
                return
            self._send_back()

    def _plan_prompts(self, plan: Plan, left: int, prompts: list[Sequence]) -> None:
        """Fill up a step with `left` tokens at most, beside decoding sequences also no more than the pace allows."""
        order = [*prompts[:1], *sorted(prompts[1:], key=lambda s: s.num_waiting)]
        keys = {s: self.pages.keys_seen(s.num_computed) for s in order}
        wanted_s = {s: s.num_waiting * self.pace.token_s(keys[s]) for s in order}
        left_s = self.pace.spare_s(sum(wanted_s.values())) if plan.pieces else math.inf
        kept = min(left // 2, sum(s.num_waiting for s in order[1:]))  # for the others
        kept_s = min(left_s / 2, sum(wanted_s[s] for s in order[1:]))
        for sequence in order:
            budget = left - kept
            if left_s < math.inf:
                budget = min(budget, self.pace.tokens(left_s - kept_s, keys[sequence], plan.num_tokens))
            count = self._plan(plan, sequence, budget, len(plan.pieces))
            left, left_s = left - count, max(kept_s, left_s - count * self.pace.token_s(keys[sequence]))
            kept, kept_s = 0, 0.0

    def accept(self, plan: Plan, tokens: list[list[int] | HerdError]) -> list[tuple[Sequence, ChatEvent | HerdError]]:
        """Record that `plan` was computed and that its due pieces drew `tokens`, one or more each or none; say what readers get."""
        tally = self.tally
        events: list[tuple[Sequence, ChatEvent | HerdError]] = []
        for piece in plan.pieces:
            sequence = piece.sequence
            tally.computed_tokens += piece.stop - piece.start
            if not piece.num_rows:
                self._computed(sequence, piece.stop)
                if sequence.tells_progress and len(sequence.tokens) == sequence.num_prompt:  # what is computed again tells nothing
                    events.append((sequence, sequence.progress()))
        for sequence in [piece.sequence for piece in plan.pieces if not piece.sequence.num_waiting]:  # it was all to be computed
            events.append((sequence, sequence.read()))
            tally.prompt_tokens += sequence.num_prompt
            tally.finished["stop"] += self._forget(sequence)
        for piece, drawn in zip(plan.due, tokens, strict=True):
            sequence = piece.sequence
            if isinstance(drawn, HerdError):
                events.append((sequence, drawn))
                tally.failed += self._forget(sequence)
                continue
            before = len(sequence.tokens)
            events += [(sequence, event) for event in sequence.accept(drawn)]
            tally.prompt_tokens += before if before == sequence.num_prompt else 0
            tally.generated_tokens += len(sequence.tokens) - before
            self._computed(sequence, len(sequence.tokens) - 1)  # drafts that were wrong are written over by what comes
            tally.drafted_tokens += len(piece.drafts)
            tally.accepted_tokens += len(drawn) - 1
            sequence.lookup.learn(piece.num_guesses, len(drawn) - 1)
            if sequence.finish:
                tally.finished[sequence.finish] += self._forget(sequence)
        return events

    def _computed(self, sequence: Sequence, stop: int) -> None:
        self.pages.computed(sequence, stop)
        if self.shelf and sequence.shares:
            self.shelf.put(sequence)

    def learn(self, plan: Plan, seconds: float) -> None:
        """Take note of how long the computation of `plan` took."""
        has_front = any(not piece.sequence.background for piece in plan.pieces)
        paid = [piece for piece in plan.pieces if not piece.is_decoding or (has_front and piece.sequence.background)]
        prompts = [(piece.stop - piece.start, self.pages.keys_seen(piece.start)) for piece in paid]
        if len(prompts) < len(plan.pieces):
            self.pace.saw(sum(count for count, _ in prompts), sum(count * keys for count, keys in prompts), seconds)
        self.payoff.saw(plan.num_tokens, seconds)

    def _plan(self, plan: Plan, sequence: Sequence, budget: int, others: int = 0) -> int:
        """Add the next piece of `sequence` to the plan and give it pages; returns its tokens, 0 where it cannot go on.

        others: sequences that decode in the same step.
        """
        if sequence not in self.running or not budget:  # it may have given way
            return 0
        if sequence.num_waiting > 1:
            self._count(sequence, self.pages.reuse(sequence))
        start, most = sequence.num_computed, budget
        if self.pages.chunk_tokens:
            most = min(budget, self.pages.chunk_start(start) + self.pages.chunk_tokens - start)
        count = min(sequence.num_waiting, most)
        keys: list[bytes] = []
        drafts: list[int] = []
        num_guesses = 0
        if sequence.num_waiting > 1:
            keys = self.pages.keys(sequence, start, start + count)
            if keys and keys[0] in plan.under_way:
                return 0
        else:
            drafts, num_guesses = sequence.drafts(min(most, sequence.reply_left) - 1, self.payoff, others)
            if not self.pages.grow(sequence, start + 1 + len(drafts)):
                drafts, num_guesses = [], 0  # nobody gives way to a guess
        while not self.pages.grow(sequence, start + count):
            victim = self._send_back()
            plan.pieces[:] = [piece for piece in plan.pieces if piece.sequence is not victim]
            if victim is sequence:
                return 0
        is_due = count == sequence.num_waiting and sequence.mean is None
        count += len(drafts)
        plan.pieces.append(Piece(sequence, start, start + count, is_due + len(drafts), drafts, num_guesses))
        plan.under_way.update(keys)
        return count

    def _send_back(self) -> Sequence:
        """Let the last of the running give way: it goes back to the head of its part of the queue."""
        victim = self.running.pop()
        self.pages.release(victim)
        self.waiting.insert(_num_front(self.waiting) if victim.background else 0, victim)
        self.tally.preempted += 1
        return victim

    def _admit(self, sequence: Sequence) -> bool:
        """Let the first of the queue run if the rest of it would fit now, beside what the running lack; less would make others give way."""
        if self.shelf and sequence.shares:
            self.shelf.restore(sequence)
        saved = self.pages.reuse(sequence)
        lacking = [self.pages.lacking(s, len(s.tokens)) for s in (*self.running, sequence)]
        full, local = (sum(pages) for pages in zip(*lacking, strict=True))
        if full > self.pages.full.room or local > self.pages.local.room:
            self.pages.release(sequence)
            return False
        self._count(sequence, saved)
        self.running.insert(len(self.running) if sequence.background else _num_front(self.running), self.waiting.popleft())
        return True

    def _count(self, sequence: Sequence, saved: int) -> None:
        """Of the tokens that were taken over, those that are the prompt's and new to the sequence are told its reader."""
        self.tally.hit_tokens += saved
        sequence.num_cached += max(0, min(sequence.num_computed, sequence.num_prompt) - sequence.num_reached)
        sequence.num_reached = max(sequence.num_reached, sequence.num_computed)


def _num_front(line: Iterable[Sequence]) -> int:
    """How many of those in line are not in the background; they stand first."""
    return sum(not sequence.background for sequence in line)
