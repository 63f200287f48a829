"""How much prompt work a step may do beside sequences that decode, so that those keep their speed.

An account. Its unit is the time of a step that only decodes. Every step that decodes pays in 1 / share - 1 of them, and prompts draw on it
what they took, by the clock: so over any long time decoding gets its share, whatever was expected. Prompts do not take a little of every
step, since a few rows cost nearly what many do (kernels work in tiles); they wait until the account covers as much as makes a step LONGEST
times as long, which bounds the gap between two tokens. The steps in between only decode, which tells how long that takes.

How many tokens that is, is foreseen: a prompt in a step takes so much for each token, for each key that such a token sees (contexts grow),
and once more for being there. The three are fitted to the last steps with prompts by least squares, one round of coordinate descent a step,
none below 0. Errors count in relation to the step's time, so a step that was slow for other reasons counts little. Where nothing tells
them apart, a step at most twice as large as one before and a piece cut in half now and then find out.
"""

import math
from collections import deque
from operator import mul

LONGEST = 2.5  # times a step that only decodes: what a step with prompts should take at most
SAVED = 2  # such steps that are saved up at most, for the prompt that comes into a quiet time
LEAST_EARNED = 0.05  # a step, even where the share is 1: every prompt must get on
ALONE = 8  # of so many steps one only decodes, even where the account allows more
TILES = (8, 4, 2)  # rows that kernels do at once, the best first
HALVES = 8  # of so many pieces one is half as long, which tells what tokens take from what comes with a piece
REMEMBERED = 15  # steps that only decoded, whose median counts
MEMORY = 0.97  # weight of the memory of the last step with prompts: some thirty are remembered
START = (0.125, 0.125 / 4096, 0.0)  # the three costs, in steps that only decode, before anything is known


class Pace:
    """The account, and what steps cost."""

    def __init__(self, share: float) -> None:
        """share: of their speed that decoding sequences keep while prompts come in; 0: no promise."""
        self.share = share
        self.longest = max(LONGEST, 1 / share if share else math.inf)  # a small share allows longer steps
        self.most_saved = SAVED * (self.longest - 1)
        self.saved = self.most_saved  # of prompt work, in steps that only decode; below 0 where prompts took more than was foreseen
        self.decode_s = 0.0  # of a step that only decodes; 0: not known yet
        self._costs = [0.0] * 3  # s of prompts in a step: for each token; for each key that one sees; once
        self._products = [[0.0] * 3 for _ in START]  # sums over the last steps with prompts, see `_fit`
        self._sums = [0.0] * 3
        self._most = 4.0  # tokens of a recent step
        self._num_pieces = self._since = 0  # steps with prompts: all, and those since the last that only decoded
        self._alone: deque[float] = deque(maxlen=REMEMBERED)  # seconds of those

    def token_s(self, keys: float) -> float:
        """Of one more prompt token that sees so many keys, on average over the layers."""
        return self._costs[0] + self._costs[1] * keys

    def saw(self, tokens: int, keys: float, seconds: float) -> None:
        """Learn from a step that decoded, and in which `tokens` of prompts saw `keys` in all."""
        if seconds <= 0 or not self.share:
            return
        work = (float(tokens), keys, 1.0)
        if not self.decode_s:
            self.decode_s = seconds / (1 + sum(map(mul, START, work)))
            self._costs = [cost * self.decode_s for cost in START]
        self.saved = min(self.most_saved, self.saved + max(LEAST_EARNED, 1 / self.share - 1))
        if tokens:  # what took far longer than foreseen did so for another reason
            most = 2 * (self.decode_s + sum(map(mul, self._costs, work)))
            self.saved -= min(seconds, most) / self.decode_s - 1
            self._fit(work, seconds)
            self._most, self._since, self._num_pieces = max(tokens, 0.8 * self._most), self._since + 1, self._num_pieces + 1
        else:
            self._since = 0
            self._alone.append(seconds)
            self.decode_s = sorted(self._alone)[(len(self._alone) - 1) // 2]

    def _fit(self, work: tuple[float, ...], seconds: float) -> None:
        each, wanted = [x / seconds for x in work], max(0.0, 1 - self.decode_s / seconds)
        for i, row in enumerate(self._products):
            row[:] = [MEMORY * old + each[i] * other for old, other in zip(row, each, strict=True)]
            self._sums[i] = MEMORY * self._sums[i] + each[i] * wanted
        for i, row in enumerate(self._products):
            if row[i] > 1e-100:  # what was not seen for ages says nothing
                self._costs[i] = max(0.0, self._costs[i] + (self._sums[i] - sum(map(mul, row, self._costs))) / row[i])

    def spare_s(self, wanted_s: float) -> float:
        """Seconds for tokens of prompts in a step that decodes, `wanted_s` being what all of them would take. 0: not this time."""
        if not self.share:
            return math.inf
        piece_s = self._costs[2]
        if self.saved * self.decode_s < min((self.longest - 1) * self.decode_s, piece_s + wanted_s) or self._since >= ALONE - 1:
            return 0.0
        return max((self.longest - 1) * self.decode_s - piece_s, piece_s)  # at least as long as what comes with it

    def tokens(self, seconds: float, keys: float, rows: int) -> int:
        """How many of a prompt take about so long; beside the `rows` of the step whole tiles of them, and one where any time is given."""
        if seconds <= 0:
            return 0
        each_s, most = self.token_s(keys), 2 * self._most
        count = most if seconds >= most * each_s else seconds / each_s
        for tile in TILES:
            whole = int(rows + min(count * 4 / 3, count + tile / 2)) // tile * tile - rows  # to the nearest, but a third more at most
            if whole > 0:
                return -(-whole // 2) if self._num_pieces % HALVES == HALVES - 1 else whole
        return 1
