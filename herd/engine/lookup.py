"""Guesses at the next tokens of a reply, looked up in what the sequence has said already.

What was written after the same few tokens before, often follows again: code that is edited, text that is quoted, a list that goes on. A
guess costs little where a step waits for memory, and nothing that is wrong comes of it: the model computes the guessed tokens in the same
step, the sequence's own sampler draws at every position, and guesses are kept while they are what was drawn. Replies are those without.
Source: Saxena, "Prompt Lookup Decoding", 2023; the test of a guess by equality is speculative sampling for guesses without probabilities.

How many are made is each sequence's own experience: twice as many after all were right, as many as were right after some, half as many
after none; and after a single one that was wrong, a pause that doubles each time, so that free talk pays next to nothing.
"""

from array import array
from collections.abc import Sequence

LONGEST, SHORTEST = 4, 2  # tokens that must be the same
WINDOW = 1 << 16  # tokens that are searched, the last
FIRST_DRAFTS = 2
PAUSES = (16, 256)  # steps without a guess: the first pause and the longest


class Lookup:
    """The tokens of one sequence and how guesses at them went."""

    def __init__(self, most: int) -> None:
        """most: drafts at once; 0 for none ever."""
        self.most = most
        self.size = min(FIRST_DRAFTS, most)
        self.pause = PAUSES[0]
        self.num_drafted = self.num_accepted = 0
        self._rest = 0  # steps of the pause that are left
        self._seen = bytearray()  # the tokens, four bytes each

    def drafts(self, tokens: Sequence[int], most: int) -> list[int]:
        """At most `most` that may follow `tokens`: those that followed the last place where the last few stand, as many as do anywhere."""
        if self._rest:
            self._rest -= 1
            return []
        count = min(self.size, most)
        if count <= 0:
            return []
        self._seen += array("i", tokens[len(self._seen) // 4 :]).tobytes()
        follows = self._follows()
        if follows is None:
            return []
        found = array("i", bytes(self._seen[4 * follows : 4 * (follows + count)])).tolist()
        while len(found) < count:  # what follows reaches the end, so it repeats itself
            found += found[: count - len(found)]
        return found

    def _follows(self) -> int | None:
        """The position after the last earlier place of the longest run of last tokens that has one."""
        found = None
        for length in range(SHORTEST, LONGEST + 1):
            place = self._last_place(self._seen[-4 * length :])
            if place is None:
                break
            found = place + length
        return found

    def _last_place(self, run: bytearray) -> int | None:
        end, begin = len(self._seen) - 4, max(0, len(self._seen) - 4 * WINDOW)
        at = self._seen.rfind(run, begin, end)
        while at % 4 and at > 0:  # not where a token begins
            at = self._seen.rfind(run, begin, at + len(run) - 1)
        return at // 4 if at >= 0 else None

    def learn(self, num_drafted: int, num_accepted: int) -> None:
        """Take note of how many of the last drafts were right."""
        if not num_drafted:
            return
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted
        if num_accepted == num_drafted:
            self.size = min(self.most, 2 * self.size)
        elif num_accepted:
            self.size = num_accepted
        else:
            self.size //= 2
        if num_accepted:
            self.pause = PAUSES[0]
        elif not self.size:
            self.size, self._rest, self.pause = 1, self.pause, min(PAUSES[1], 2 * self.pause)
