"""Guesses at the next tokens of a reply, looked up in what the sequence has said already.

What was written after the same few tokens before, often follows again: code that is edited, text that is quoted, a list that goes on.
Nothing that is wrong comes of it: the model computes the guessed tokens in the same step, the sequence's own sampler draws at every
position, and guesses are kept while they are what was drawn. Replies are those without.
Source: Saxena, "Prompt Lookup Decoding", 2023; the test of a guess by equality is speculative sampling for guesses without probabilities.

How many are made is a matter of their chance and of their price. The price is `Payoff`'s. The chance is this sequence's own experience with
runs of about the same length: after two tokens that stood together before anything may follow, after sixteen hardly anything but the same.
It is learned without cost too: where nothing is guessed, what would have been is remembered and held against what is drawn.
"""

from array import array
from collections.abc import Sequence

from herd.engine.payoff import Payoff

SHORTEST, LONGEST = 2, 32  # tokens that must be the same, and up to which sameness counts
SEARCHED = 4  # tokens of the longest run that is searched for; what is found is followed backwards
WINDOW = 1 << 16  # tokens that are searched, the last
KEEP = 0.9  # weight of experience, with every guess
BELIEF = 2.0  # guesses that what was believed at first weighs as much as
FIRST = (0.15, 0.4, 0.6, 0.8, 0.9)  # chances that are believed at first after runs of 2, 4, 8, 16 and 32 tokens and more


class Lookup:
    """The tokens of one sequence and how guesses at them went."""

    def __init__(self, most: int) -> None:
        """most: drafts at once; 0 for none ever."""
        self.most = most
        self.num_drafted = self.num_accepted = 0
        self._right, self._tried = [BELIEF * chance for chance in FIRST], [BELIEF] * len(FIRST)  # by length of the run
        self._unasked: tuple[int, int] | None = None  # a guess that was not made: what, at which position
        self._kind = 0  # of the last run
        self._seen = bytearray()  # the tokens, four bytes each

    def chance(self, kind: int) -> float:
        """Of a guess, after a run of `SHORTEST << kind` tokens or more, to be right when those before it are."""
        return self._right[kind] / self._tried[kind]

    def drafts(self, tokens: Sequence[int], most: int, payoff: Payoff, others: int = 0) -> list[int]:
        """At most `most` that may follow `tokens`: those that followed the last place where the last few stand, as many as do anywhere.

        others: how many more sequences decode in the same step.
        """
        if not self.most:
            return []
        self._seen += array("i", tokens[len(self._seen) // 4 :]).tobytes()
        if self._unasked and self._unasked[1] < len(tokens):
            guess, position = self._unasked
            self._note(self._kind, tokens[position] == guess)
        self._unasked = None
        place, length = self._follows()
        if not length:
            return []
        self._kind = min(length.bit_length() - SHORTEST.bit_length(), len(FIRST) - 1)
        count = payoff.drafts(self.chance(self._kind), others, min(self.most, most))
        if not count:
            self._unasked = self._read(place, 1)[0], len(tokens)
            return []
        found = self._read(place, count)
        while len(found) < count:  # what follows reaches the end, so it repeats itself
            found += found[: count - len(found)]
        return found

    def learn(self, num_drafted: int, num_accepted: int) -> None:
        """Take note of how many of the last drafts were right."""
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted
        for _ in range(num_accepted):
            self._note(self._kind, True)
        if num_accepted < num_drafted:
            self._note(self._kind, False)

    def _note(self, kind: int, is_right: bool) -> None:
        self._right[kind] = KEEP * self._right[kind] + is_right
        self._tried[kind] = KEEP * self._tried[kind] + 1

    def _follows(self) -> tuple[int, int]:
        """The position after the last earlier place of the longest run of last tokens that has one, and the run's length, 0 for none."""
        found = length = 0
        for wanted in range(SHORTEST, SEARCHED + 1):
            place = self._last_place(self._seen[-4 * wanted :])
            if place is None:
                return found, length
            found, length = place + wanted, wanted
        last = len(self._seen) // 4
        while length < min(LONGEST, found) and self._token(found - length - 1) == self._token(last - length - 1):
            length += 1
        return found, length

    def _last_place(self, run: bytearray) -> int | None:
        end, begin = len(self._seen) - 4, max(0, len(self._seen) - 4 * WINDOW)
        at = self._seen.rfind(run, begin, end)
        while at % 4 and at > 0:  # not where a token begins
            at = self._seen.rfind(run, begin, at + len(run) - 1)
        return at // 4 if at >= 0 else None

    def _token(self, position: int) -> bytearray:
        return self._seen[4 * position : 4 * position + 4]

    def _read(self, position: int, count: int) -> list[int]:
        return array("i", bytes(self._seen[4 * position : 4 * (position + count)])).tolist()
