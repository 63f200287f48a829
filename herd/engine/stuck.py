"""How long a reader waits for an engine whose step does not end.

A step is native code, a driver, a disk: any of them can hang, and a thread cannot be ended from outside. It can be told: `/health` tells
a supervisor, who starts the process anew, and a `Patience` tells its reader, who would wait for ever.
"""

import asyncio
import math
from collections.abc import Callable

from herd.engine.thread import EngineThread
from herd.errors import HerdError, ResourceError

TICKS = 4


class Patience:
    """Looks at a reader's engine from time to time, until `end`, and tells the reader when the engine is stuck.

    A step has lasted too long when so many looks in a row have found it. Time alone would not do: where the whole process was stopped for
    a while (Ctrl-Z, a container that was frozen), a step has lasted long and nothing is wrong.
    """

    def __init__(self, thread: EngineThread, limit_s: float, tell: Callable[[HerdError], None]) -> None:
        """limit_s: seconds of a step, a quarter more at most; inf: wait for ever.  tell: called once, in the event loop."""
        self._thread, self._limit_s, self._tell = thread, limit_s, tell
        self._step: float | None = None  # when the step began that was found last
        self._num_found = 0
        self._timer: asyncio.TimerHandle | None = None
        self._look()

    def _look(self) -> None:
        began = self._thread.step_began
        self._num_found = self._num_found + 1 if began is not None and began == self._step else 0
        self._step = began
        if self._num_found >= TICKS:
            self._tell(stuck_error(self._limit_s))
        elif self._limit_s < math.inf:
            self._timer = asyncio.get_running_loop().call_later(self._limit_s / TICKS, self._look)

    def end(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()


def stuck_error(limit_s: float) -> HerdError:
    """What is told of an engine that has been in one step for longer than that."""
    return ResourceError(f"the engine has not ended a step for {limit_s:g} s", "the operator may have to restart herd", retry_after_s=30)
