"""Backends without a model: `Echo` answers with what was said, `Script` does as it is told and remembers how it ended."""

import asyncio
import re
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from herd.chat import ChatEvent, ChatRequest, Done, Text, Usage
from herd.serve.app import bind, make_app, run
from herd.serve.config import ServeConfig


class Echo:
    """Answers with the text of the last message, word by word, a token each, and remembers what it was asked."""

    def __init__(self, *names: str, word_s: float = 0.0) -> None:
        self.names = list(names) or ["echo"]
        self.word_s = word_s  # seconds that a word takes
        self.requests: list[ChatRequest] = []

    def models(self) -> list[str]:
        return self.names

    async def chat(self, request: ChatRequest) -> AsyncIterator[ChatEvent]:
        self.requests.append(request)
        words = re.findall(r"\s*\S+", request.messages[-1].text)
        limit = request.sampling.max_tokens or len(words)
        for word in words[:limit]:
            await asyncio.sleep(self.word_s)
            yield Text(text=word)
        prompt_tokens = sum(len(message.text.split()) for message in request.messages)
        usage = Usage(prompt_tokens=prompt_tokens, completion_tokens=min(limit, len(words)))
        yield Done(reason="length" if limit < len(words) else "stop", usage=usage)


class Script:
    """Plays its steps for every request: an event is sent, a number is slept through in seconds, an exception raised.

    Its clean-up awaits, as that of a provider's connection does; `closed` is set when that has run to its end.
    """

    def __init__(self, steps: Sequence[ChatEvent | float | Exception]) -> None:
        self.steps = steps
        self.started, self.closed = threading.Event(), threading.Event()

    def models(self) -> list[str]:
        return ["echo"]

    async def chat(self, _: ChatRequest) -> AsyncIterator[ChatEvent]:
        task = asyncio.current_task()
        self.started.set()
        try:
            for step in self.steps:
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, float):
                    await asyncio.sleep(step)
                else:
                    yield step
        finally:
            await asyncio.sleep(0.01)
            await asyncio.sleep(0.01)
            if asyncio.current_task() is task:  # one task owns a stream from first to last
                self.closed.set()


def words(*texts: str) -> list[ChatEvent]:
    """The events of a reply."""
    return [*(Text(text=text) for text in texts), Done(reason="stop", usage=Usage(prompt_tokens=3, completion_tokens=len(texts)))]


def serve_echo(word_s: float, data_folder: str | None = None) -> None:
    """A server over `Echo`, for a process of its own: it tells its address, and in the end that it has stopped."""
    config = ServeConfig(port=0, drain_s=1, data_folder=Path(data_folder) if data_folder else None)
    run(make_app(Echo(word_s=word_s), config), bind(config), config, ready=_say)
    _say("stopped")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
