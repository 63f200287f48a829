"""The thread that owns an engine: others hand it sequences and take them away; events come back through each one's `emit`."""

import atexit
import queue
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial

import torch

from herd.chat import Done
from herd.engine.engine import Engine
from herd.engine.memory import sweep
from herd.engine.sequence import Sequence
from herd.errors import HerdError
from herd.log import log

Inbox = queue.SimpleQueue[tuple[bool, Sequence] | None]  # (is new, sequence); None ends the thread
MayGo = weakref.WeakMethod[Callable[[], float]]  # asked when there is nothing to do: 0 to end, else the seconds after which to ask again


class EngineThread:
    """A handle on the thread. When the handle goes, or the program ends, the thread ends after the step that it is in."""

    def __init__(self, engine: Engine, name: str, may_go: MayGo | None = None) -> None:
        self.engine = engine
        self._loop = _Loop(engine, may_go)
        self.thread = threading.Thread(target=self._loop.run, name=f"herd-{name}", daemon=True)
        self._loop.at_exit = partial(_at_exit, self._loop, self.thread)
        atexit.register(self._loop.at_exit)  # python must not end under a thread that is inside a kernel
        self.thread.start()
        weakref.finalize(self, self._loop.inbox.put, None).atexit = False

    @property
    def failure(self) -> HerdError | None:
        """Why the engine has died, if it has."""
        return self._loop.failure

    @property
    def step_began(self) -> float | None:
        """When the step began that the thread is in, by `time.monotonic`; None between steps."""
        return self._loop.step_began

    @property
    def step_s(self) -> float:
        """Seconds that the step has lasted which the thread is in; 0 between steps."""
        began = self._loop.step_began
        return 0.0 if began is None else time.monotonic() - began

    def submit(self, sequence: Sequence) -> None:
        """Start computing; raises the engine's failure if it has died."""
        if self.failure:
            raise self.failure
        self._loop.inbox.put((True, sequence))

    def cancel(self, sequence: Sequence) -> None:
        """Stop computing and free all that it held. No harm if it has ended."""
        self._loop.inbox.put((False, sequence))

    def end(self) -> None:
        """End the thread after its step. What the engine held is freed when nobody refers to this handle any more."""
        self._loop.inbox.put(None)


def _at_exit(loop: "_Loop", thread: threading.Thread) -> None:
    loop.is_last = True
    loop.inbox.put(None)
    thread.join()


class _Loop:
    """What the thread runs. It knows nothing of its handle, so that the handle can go."""

    def __init__(self, engine: Engine, may_go: MayGo | None) -> None:
        self.inbox: Inbox = queue.SimpleQueue()
        self.failure: HerdError | None = None
        self.at_exit: Callable[[], None] = lambda: None
        self.step_began: float | None = None
        self.is_last = False  # the program ends, and its memory with it
        self._engine: Engine | None = engine
        self._may_go = may_go
        self._live: set[Sequence] = set()

    def run(self) -> None:
        try:
            assert self._engine is not None
            self._compute(self._engine)
            self._engine.close()
        finally:
            self._engine = None
            self._live.clear()
            atexit.unregister(self.at_exit)  # it would keep all this for the rest of the process
            if not self.is_last:
                sweep()

    def _compute(self, engine: Engine) -> None:
        if engine.runner.whole is not None:
            torch.set_num_threads(1)  # of this thread: what is left to torch is small, and a second pool would fight for the cores
        try:
            while self._read_inbox(engine):
                self._step(engine)
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

    # What follows is in functions of its own so that a thread which waits holds no sequence that has ended in a variable.

    def _step(self, engine: Engine) -> None:
        self.step_began = time.monotonic()
        try:
            events = engine.step()
        finally:
            self.step_began = None
        for sequence, event in events:
            if isinstance(event, Done | HerdError):
                self._live.discard(sequence)
            sequence.emit(event)
        for flush in {sequence.flush for sequence, _ in events if sequence.flush}:
            flush()

    def _read_inbox(self, engine: Engine) -> bool:
        """Take in what has been handed over, and wait for something when there is nothing to compute; False when the thread is to end."""
        while engine.scheduler.is_idle or not self.inbox.empty():
            if not self._take_in(engine, self._next_letter()):
                return False
        return True

    def _take_in(self, engine: Engine, letter: tuple[bool, Sequence] | None) -> bool:
        if letter is None:
            return False
        is_new, sequence = letter
        if is_new:
            engine.scheduler.add(sequence)
            self._live.add(sequence)
        elif sequence in self._live:
            engine.remove(sequence)
            self._live.discard(sequence)
        return True

    def _next_letter(self) -> tuple[bool, Sequence] | None:
        """The next from the inbox, waiting for it; None where the thread may go instead."""
        while self._may_go is not None and self.inbox.empty():
            ask = self._may_go()
            left_s = ask() if ask is not None else 0.0
            del ask
            if not left_s:
                return None
            try:
                return self.inbox.get(timeout=left_s)
            except queue.Empty:
                continue
        return self.inbox.get()
