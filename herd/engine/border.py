"""Events on their way from the threads of engines to an event loop."""

import asyncio
import weakref
from collections import deque
from contextlib import suppress

from herd.chat import ChatEvent
from herd.errors import HerdError


class Border:
    """Between the threads of engines and an event loop: events wait here until the step that made them is over.

    To wake a loop is a system call, at which an engine's thread loses the interpreter's lock; once a step is enough, whatever its events.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._waiting: deque[tuple[asyncio.Queue[ChatEvent | HerdError], ChatEvent | HerdError]] = deque()

    def post(self, reader: asyncio.Queue[ChatEvent | HerdError], event: ChatEvent | HerdError) -> None:
        self._waiting.append((reader, event))

    def flush(self) -> None:
        """Let the loop hand out what waits. From any thread."""
        loop = self._loop()
        with suppress(RuntimeError):  # the loop has closed: nobody reads any more, and that must not stop the engine
            if loop is not None:
                loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        while self._waiting:
            reader, event = self._waiting.popleft()
            reader.put_nowait(event)
