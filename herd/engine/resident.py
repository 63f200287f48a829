"""An engine that is here when it is asked for, and goes when nobody has for a while: weights, pages and thread, all of it.

Who computes holds a `Stay`, and while anybody does the engine stays. An engine that has nothing to do asks at times whether it may go
(`EngineThread`), so no thread but its own watches the clock. What comes back is opened anew, as it was the first time.
"""

import math
import threading
import time
from collections.abc import Callable
from typing import Literal
from weakref import WeakMethod, WeakSet

from herd.engine.engine import Engine
from herd.engine.thread import EngineThread
from herd.errors import HerdError, UsageError
from herd.log import log

State = Literal["loaded", "loading", "unloaded", "failed"]


class Stay:
    """Somebody's hold on an engine, until `end`, or until it is forgotten."""

    def __init__(self, thread: EngineThread, left: "Callable[[Stay], None]") -> None:
        self.thread = thread
        self._left = left

    def end(self) -> None:
        """Let the engine go, as far as this one is concerned. A second time does no harm."""
        self._left(self)

    def __enter__(self) -> "Stay":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


class Resident:
    """The engine of one model, in memory or not."""

    def __init__(
        self, name: str, open_engine: Callable[[], Engine], *, idle_s: float = 0.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """idle_s: seconds without a request after which the engine goes, 0: never.  clock: seconds, from anywhere."""
        if not 0 <= idle_s < math.inf:
            raise UsageError(f"idle_s is {idle_s}; it must be 0 (never unload) or a number of seconds", param="idle_s")
        self.name, self.idle_s = name, idle_s
        self._open, self._clock = open_engine, clock
        self._making = threading.Lock()  # held while the engine is made, so that it is made once
        self._guard = threading.RLock()  # of what follows; again in the same thread where the collector finds a reply that was forgotten
        self._thread: EngineThread | None = None
        self._going: threading.Thread | None = None  # of the engine before, which may not be gone yet
        self._stays: WeakSet[Stay] = WeakSet()
        self._last_used = clock()
        self.context_tokens: int | None = None  # of the engine that was here last; None before there was one

    @property
    def state(self) -> State:
        thread = self._thread
        if thread is None:
            return "loading" if self._making.locked() else "unloaded"
        return "failed" if thread.failure else "loaded"

    @property
    def failure(self) -> HerdError | None:
        """Why the engine has died, if it has; one that is not loaded has not."""
        thread = self._thread
        return thread.failure if thread else None

    @property
    def step_s(self) -> float:
        """Seconds that the step has lasted which the engine is in; 0 between steps, and where it is not here."""
        thread = self._thread
        return thread.step_s if thread else 0.0

    @property
    def engine(self) -> Engine | None:
        """The engine if it is here; asking brings none back."""
        thread = self._thread
        return thread.engine if thread else None

    def load(self) -> None:
        """Return when the engine is here. Whoever asks meanwhile waits for the same one. Raises what making it raises."""
        with self._making:
            if self._thread is not None:
                return
            if self._going is not None:
                self._going.join()  # never two of them in memory
            engine = self._open()
            with self._guard:  # before its thread may ask whether it may go again
                self._last_used = self._clock()
                self.context_tokens = engine.context_tokens
                self._thread = EngineThread(engine, self.name, WeakMethod(self._may_go) if self.idle_s else None)

    def stay_if_loaded(self) -> Stay | None:
        """Hold the engine; None where it would have to be loaded. Waits for nothing."""
        with self._guard:
            if self._thread is None:
                return None
            stay = Stay(self._thread, self._left)
            self._stays.add(stay)
            return stay

    def stay(self) -> Stay:
        """Hold the engine, which is loaded first where it is not here."""
        while (stay := self.stay_if_loaded()) is None:
            self.load()
        return stay

    def unload(self) -> bool:
        """Let the engine go now, and wait until it has; False, and nothing happens, while somebody holds it."""
        with self._making:
            with self._guard:
                if self._stays:
                    return False
                if self._thread is not None:
                    self._thread.end()
                    self._going, self._thread = self._thread.thread, None
            if self._going is not None:
                self._going.join()
        return True

    def _left(self, stay: Stay) -> None:
        with self._guard:
            if stay in self._stays:
                self._stays.discard(stay)
                self._last_used = self._clock()

    def _may_go(self) -> float:
        """Asked by the engine's thread when it has nothing to do: 0 to go, else the seconds after which to ask again."""
        with self._guard:
            if self._stays:
                return self.idle_s
            left_s = self._last_used + self.idle_s - self._clock()
            if left_s > 0:
                return left_s
            if self._thread is not None:
                self._going, self._thread = self._thread.thread, None
        log.info("%s had no request for %g s and is unloaded; the next one brings it back", self.name, self.idle_s)
        return 0.0
