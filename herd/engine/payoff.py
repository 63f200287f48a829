"""What a step costs by its tokens, and so how many guesses are worth a place in it.

A step of R tokens takes about `step_s + R * token_s`. Both are fitted to the steps that were, by least squares of relative errors with a
short memory, so the same code knows that guesses are nearly free where a step waits for memory, and dear where it waits for arithmetic or
where many sequences share it already. One more guess pays while what it may give, at the rate of the step as it stands, takes longer than
the guess itself: while its chance is above `token_s * tokens / seconds`. The chances fall from guess to guess, so the first that does not
pay is the end.
"""

MEMORY = 0.97  # weight of the last step's memory: about thirty steps are remembered
PULL = 0.01  # weight of the fit before, which tells the two apart where steps are all alike
MOST_PRICE = 0.9  # in tokens: a guess that is almost sure is always tried, or a wrong fit would never be put right


class Payoff:
    """The cost of steps."""

    def __init__(self) -> None:
        self.step_s = self.token_s = 0.0  # estimates; both 0: not known yet
        self._xx = self._xy = self._yy = self._x = self._y = 0.0  # sums over steps; x: 1 / seconds, y: tokens / seconds

    def saw(self, tokens: int, seconds: float) -> None:
        """Learn from a step."""
        if seconds <= 0 or tokens <= 0:
            return
        if not self.step_s and not self.token_s:
            self.step_s, self.token_s = seconds / 2, seconds / 2 / tokens
        x, y = 1 / seconds, tokens / seconds
        self._xx = MEMORY * self._xx + x * x
        self._xy = MEMORY * self._xy + x * y
        self._yy = MEMORY * self._yy + y * y
        self._x = MEMORY * self._x + x
        self._y = MEMORY * self._y + y
        xx, yy = (1 + PULL) * self._xx, (1 + PULL) * self._yy
        rest_x, rest_y = self._x + PULL * self._xx * self.step_s, self._y + PULL * self._yy * self.token_s
        determinant = xx * yy - self._xy**2
        self.step_s = max(0.0, (rest_x * yy - rest_y * self._xy) / determinant)
        self.token_s = max(0.0, (rest_y * xx - rest_x * self._xy) / determinant)

    def price(self, rows: int, tokens: float) -> float:
        """Of one more row in a step that has `rows` and is expected to give `tokens`: in tokens that its time would give otherwise."""
        seconds = self.step_s + rows * self.token_s
        return min(MOST_PRICE, self.token_s * tokens / seconds) if seconds else MOST_PRICE

    def drafts(self, chance: float, others: int, most: int) -> int:
        """How many guesses pay beside `others` sequences that get a token each; `chance`: of each to be right when those before it are."""
        count, sure, rows = 0, 1.0, others + 1
        tokens = float(rows)
        while count < most:
            sure *= chance
            if sure <= self.price(rows, tokens):
                break
            count, rows, tokens = count + 1, rows + 1, tokens + sure
        return count
