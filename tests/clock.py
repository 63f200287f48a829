"""Time as tests need it: a clock that they set, and waiting for what comes soon."""

import time
from collections.abc import Callable


class Clock:
    """Seconds that pass when the test says so, and `step` at every look."""

    def __init__(self, now: float = 0.0, step: float = 0.0) -> None:
        self.now, self.step = now, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether it comes true by then."""
    end = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.01)
    return found
