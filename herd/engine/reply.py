"""One reply, for Python: its events, folded as they come."""

import queue
from collections.abc import Iterator

from herd.chat import ChatEvent, Done, Fold, Message, Sampling, Text, Tool, ToolCall, ToolChoice
from herd.engine.resident import Stay
from herd.engine.sequence import Sequence
from herd.errors import HerdError
from herd.text.prompt import Prompt


class Reply(Iterator[str]):
    """A reply as it comes: iterate for pieces of text, or ask for the whole, which waits for the rest. Closing it frees what it held."""

    def __init__(
        self, stay: Stay, prompt: Prompt, sampling: Sampling, tools: tuple[Tool, ...] = (), choice: ToolChoice | None = None
    ) -> None:
        """stay: ended with the reply, or where there cannot be one."""
        self._fold = Fold()
        self._events: queue.SimpleQueue[ChatEvent | HerdError | None] = queue.SimpleQueue()  # None: stopped
        try:
            sequence = stay.thread.engine.sequence(prompt, sampling, self._events.put, tools=tools, tool_choice=choice)
            stay.thread.submit(sequence)
        except BaseException:
            stay.end()
            raise
        self._held: tuple[Stay, Sequence] | None = (stay, sequence)  # until it has ended: a reply that is kept must keep no weights

    def __next__(self) -> str:
        return self.next_within(None)

    def next_within(self, timeout_s: float | None) -> str:
        """The next piece, or "" where none has come in that time. Raises `StopIteration` at the end."""
        while self._held:
            try:
                event = self._events.get(timeout=timeout_s)
            except queue.Empty:
                return ""
            if event is None:
                self.close()
                break
            if isinstance(event, Done | HerdError):
                self._leave()
            if isinstance(event, HerdError):
                raise event
            self._fold.add(event)
            if isinstance(event, Text):
                return event.text
        raise StopIteration

    @property
    def done(self) -> Done | None:
        """Why it ended and what it cost, once it has."""
        return self._fold.done

    @property
    def whole(self) -> Fold:
        """All that came of it: message, log-probabilities, end."""
        for _ in self:
            pass
        return self._fold

    @property
    def message(self) -> Message:
        """The whole reply, as the conversation's next message."""
        return self.whole.message

    @property
    def text(self) -> str:
        """The text of the whole reply."""
        return self.message.text

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The calls of the whole reply."""
        return self.message.tool_calls

    @property
    def tokens(self) -> tuple[int, ...]:
        """Ids of the whole reply, its stop token included."""
        done = self.whole.done
        return done.tokens if done else ()

    def stop(self) -> None:
        """End it after what has come, which can still be read; `done` stays None. For another thread or a signal handler."""
        self._events.put(None)

    def close(self) -> None:
        """Stop computing; pieces that have not been read are lost."""
        if held := self._leave():
            stay, sequence = held
            stay.thread.cancel(sequence)

    def _leave(self) -> tuple[Stay, Sequence] | None:
        held, self._held = self._held, None
        if held:
            held[0].end()
        return held

    def __del__(self) -> None:
        if hasattr(self, "_held"):
            self.close()
