"""The thread that owns an engine: others hand it sequences and take them away; events come back through each one's `emit`."""

import atexit
import queue
import threading
import weakref

import torch

from herd.chat import Done
from herd.engine.engine import Engine
from herd.engine.sequence import Sequence
from herd.errors import HerdError
from herd.log import log

Inbox = queue.SimpleQueue[tuple[bool, Sequence] | None]  # (is new, sequence); None ends the thread


class EngineThread:
    """A handle on the thread. When the handle goes, or the program ends, the thread ends after the step that it is in."""

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine = engine
        self._loop = _Loop(engine)
        thread = threading.Thread(target=self._loop.run, name=f"herd-{name}", daemon=True)
        thread.start()
        weakref.finalize(self, self._loop.inbox.put, None).atexit = False
        atexit.register(_end, self._loop.inbox, thread)  # python must not end under a thread that is inside a kernel

    @property
    def failure(self) -> HerdError | None:
        """Why the engine has died, if it has."""
        return self._loop.failure

    def submit(self, sequence: Sequence) -> None:
        """Start computing; raises the engine's failure if it has died."""
        if self.failure:
            raise self.failure
        self._loop.inbox.put((True, sequence))

    def cancel(self, sequence: Sequence) -> None:
        """Stop computing and free all that it held. No harm if it has ended."""
        self._loop.inbox.put((False, sequence))


def _end(inbox: Inbox, thread: threading.Thread) -> None:
    inbox.put(None)
    thread.join()


class _Loop:
    """What the thread runs. It knows nothing of its handle, so that the handle can go."""

    def __init__(self, engine: Engine) -> None:
        self.inbox: Inbox = queue.SimpleQueue()
        self.failure: HerdError | None = None
        self._engine = engine
        self._live: set[Sequence] = set()

    def run(self) -> None:
        if self._engine.runner.whole is not None:
            torch.set_num_threads(1)  # of this thread: what is left to torch is small, and a second pool would fight for the cores
        try:
            while self._read_inbox():
                events = self._engine.step()
                for sequence, event in events:
                    if isinstance(event, Done | HerdError):
                        self._live.discard(sequence)
                    sequence.emit(event)
                for flush in {sequence.flush for sequence, _ in events if sequence.flush}:
                    flush()
        except Exception as error:  # whatever it was, every reader must hear of it, and the server must stop saying that all is well
            log.exception("the engine has stopped")
            self.failure = HerdError(f"the engine has stopped: {type(error).__name__}: {error}", "restart herd; its log has the details")
            for sequence in self._live:
                self._fail(sequence)
            while letter := self.inbox.get():  # what was handed over before `submit` could know
                is_new, sequence = letter
                if is_new:
                    self._fail(sequence)

    def _fail(self, sequence: Sequence) -> None:
        assert self.failure
        sequence.emit(self.failure)
        if sequence.flush:
            sequence.flush()

    def _read_inbox(self) -> bool:
        """Take in what has been handed over, and wait for something when there is nothing to compute; False when the thread is to end."""
        scheduler = self._engine.scheduler
        while scheduler.is_idle or not self.inbox.empty():
            letter = self.inbox.get()
            if letter is None:
                return False
            is_new, sequence = letter
            if is_new:
                scheduler.add(sequence)
                self._live.add(sequence)
            elif sequence in self._live:
                scheduler.remove(sequence)
                self._live.discard(sequence)
        return True
