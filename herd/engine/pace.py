"""How many tokens of prompts a step may take beside sequences that decode, so that those keep their speed.

A step takes about `decode_s` for all that decodes and `token_s` more for every token of a prompt. Both are fitted to the last steps by
least squares of relative errors, so that a step that was slow for other reasons counts little. The trap is a run of steps that are all
alike: they cannot tell the two apart, so each fit is drawn a little towards the one before.
"""

LEAST_TOKENS = 3  # of prompts in a step, whatever that costs: a prompt must get on
MEMORY = 0.95  # weight of the last step's memory: about twenty steps are remembered
PULL = 0.01  # weight of the fit before


class Pace:
    """The cost of steps, and the room that it leaves for prompts."""

    def __init__(self, share: float) -> None:
        """share: of their speed that decoding sequences keep while prompts come in; 0: no promise."""
        self.share = share
        self.decode_s = self.token_s = 0.0  # estimates; 0: not known yet
        self._dd = self._dp = self._pp = self._d = self._p = 0.0  # sums of products; d: decoding, p: prompt tokens, per second of a step

    def saw(self, is_decoding: bool, prompt_tokens: int, seconds: float) -> None:
        """Learn from a step."""
        if seconds <= 0:
            return
        d, p = is_decoding / seconds, prompt_tokens / seconds
        self._dd = MEMORY * self._dd + d * d
        self._dp = MEMORY * self._dp + d * p
        self._pp = MEMORY * self._pp + p * p
        self._d = MEMORY * self._d + d
        self._p = MEMORY * self._p + p
        dd, pp = (1 + PULL) * self._dd, (1 + PULL) * self._pp
        rest_d, rest_p = self._d + PULL * self._dd * self.decode_s, self._p + PULL * self._pp * self.token_s
        if not dd or not pp:
            self.decode_s, self.token_s = (rest_d / dd, self.token_s) if dd else (self.decode_s, rest_p / pp)
            return
        determinant = dd * pp - self._dp**2
        self.decode_s = max(0.0, (rest_d * pp - rest_p * self._dp) / determinant)
        self.token_s = max(0.0, (rest_p * dd - rest_d * self._dp) / determinant)

    def prompt_tokens(self, most: int) -> int:
        """How many a step beside decoding sequences may take, of `most` that are left."""
        if not self.share:
            return most
        spare_s = self.decode_s / self.share - self.decode_s
        wanted = most if spare_s >= most * self.token_s > 0 else int(spare_s / self.token_s) if self.token_s else LEAST_TOKENS
        return min(most, max(LEAST_TOKENS, wanted))
