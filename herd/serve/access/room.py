"""How many requests a server has under way at once, those that wait in a queue included.

Beyond that a request is refused at once: a queue that grows without end answers everybody too late, and its bodies fill the memory.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from herd.errors import BusyError

LEAST_S, MOST_S = 1.0, 60.0  # what one who is refused is asked to wait


class Room:
    """Places for requests. One is free again when its reply has been sent."""

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.most, self.taken = most, 0
        self._clock = clock
        self._mean_s = 0.0  # of late, that a request took

    @contextmanager
    def place(self) -> Iterator[None]:
        """Raises `BusyError` where there is none."""
        if self.taken >= self.most:
            wait_s = min(max(self._mean_s, LEAST_S), MOST_S)  # by then as many as are here now will have gone
            message = f"the server is busy with {self.taken:,} requests, its limit"
            raise BusyError(message, "ask again when retry-after says, or raise --max-requests", retry_after_s=wait_s)
        self.taken += 1
        begun = self._clock()
        try:
            yield
        finally:
            self.taken -= 1
            self._mean_s += (self._clock() - begun - self._mean_s) / 8
