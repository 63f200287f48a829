"""Several replies to one request, side by side, and what is told of them: usage, timings, log-probabilities."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

from herd.chat import ChatEvent, Done, Drawn, Fold, Progress
from herd.serve.access.limits import Meter
from herd.serve.metrics import Metrics

Replies = AsyncGenerator[tuple[int, ChatEvent], None]  # events of several replies, each with the place of its own
FLOOR = -9999.0  # what stands for a probability of 0, since JSON has no -inf; as OpenAI's


async def side_by_side(streams: Sequence[AsyncGenerator[ChatEvent, None]]) -> Replies:
    """Their events as they come, until each has ended. The first failure is that of all. Closing it closes all of them."""
    if len(streams) == 1:  # in the reader's own task: nothing to wait for between them
        async with aclosing(streams[0]) as events:
            async for event in events:
                yield 0, event
                if isinstance(event, Done):
                    return
        raise AssertionError("the backend's stream ended without Done")
    letters: asyncio.Queue[tuple[int, ChatEvent | Exception]] = asyncio.Queue(maxsize=4 * len(streams))  # a slow reader slows all
    tasks = [asyncio.create_task(_forward(place, stream, letters)) for place, stream in enumerate(streams)]
    try:
        num_done = 0
        while num_done < len(streams):
            place, letter = await letters.get()
            if isinstance(letter, Exception):
                raise letter
            num_done += isinstance(letter, Done)
            yield place, letter
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def _forward(
    place: int, stream: AsyncGenerator[ChatEvent, None], letters: "asyncio.Queue[tuple[int, ChatEvent | Exception]]"
) -> None:
    try:
        async with aclosing(stream) as events:
            async for event in events:
                await letters.put((place, event))
                if isinstance(event, Done):
                    return
        raise AssertionError("the backend's stream ended without Done")
    except Exception as error:  # whatever it was, the reader must hear of it
        await letters.put((place, error))


class Told:
    """What a request cost, read off the events of its replies."""

    def __init__(self, model: str, metrics: Metrics, meter: Meter | None = None, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._model, self._metrics, self._meter, self._clock = model, metrics, meter, clock
        self._started = clock()
        self._first: dict[int, float] = {}  # when the first event of each reply came
        self.ends: list[Done] = []

    async def read(self, replies: Replies) -> Replies:
        """Pass events on and take note of them."""
        under_way: Counter[int] = Counter()  # events of replies that have not ended, about a token each
        try:
            async with aclosing(replies) as events:
                async for place, event in events:
                    if isinstance(event, Progress):  # nothing of the reply yet
                        yield place, event
                        continue
                    first = self._first.get(place) or self._first.setdefault(place, self._clock())
                    under_way[place] += 1
                    if isinstance(event, Done):
                        del under_way[place]
                        self._ended(event, first)
                    yield place, event
        finally:
            if self._meter and under_way:
                self._meter.used(under_way.total(), is_end=False)

    def _ended(self, end: Done, first: float) -> None:
        self.ends.append(end)
        self._metrics.ended(self._model, end.usage, first - self._started, self._clock() - first)
        if self._meter:
            self._meter.used(end.usage.prompt_tokens - end.usage.cached_tokens + end.usage.completion_tokens)

    def progress(self, event: Progress) -> dict[str, Any]:
        """How far a prompt is read, in llama.cpp's words."""
        took = round((self._clock() - self._started) * 1e3, 3)
        return {"total": event.prompt_tokens, "cache": event.cached_tokens, "processed": event.read_tokens, "time_ms": took}

    def usage(self, num_prompts: int = 1) -> dict[str, Any]:
        """OpenAI's usage object. Replies to one prompt share it, so it counts once; cached is what was so for all of them."""
        num_each = len(self.ends) // num_prompts
        prompt = sum(end.usage.prompt_tokens for end in self.ends) // num_each
        completion = sum(end.usage.completion_tokens for end in self.ends)
        cached = [end.usage.cached_tokens for end in self.ends]
        num_cached = min(cached) if num_prompts == 1 else sum(cached) // num_each
        usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        num_image = sum(end.usage.image_tokens for end in self.ends) // num_each
        details = {"cached_tokens": num_cached} | ({"image_tokens": num_image} if num_image else {})
        return {**usage, "prompt_tokens_details": details}

    def timings(self, num_prompts: int = 1) -> dict[str, Any]:
        """What it took, by the server's clock, in llama.cpp's words. The prompt's share ends when something of a reply is there."""
        now = self._clock()
        first = min(self._first.values(), default=now)
        usage = self.usage(num_prompts)
        prompt, reply = (first - self._started) * 1e3, (now - first) * 1e3
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        num_prompt, num_reply = usage["prompt_tokens"] - cached, usage["completion_tokens"]
        return {
            "cache_n": cached,
            "prompt_n": num_prompt,
            "prompt_ms": round(prompt, 3),
            "prompt_per_second": round(num_prompt / prompt * 1e3, 3) if prompt else None,
            "predicted_n": num_reply,
            "predicted_ms": round(reply, 3),
            "predicted_per_second": round(num_reply / reply * 1e3, 3) if reply else None,
        }


async def folded(replies: Replies, count: int) -> list[Fold]:
    """Whole replies, in their order. Closes `replies`."""
    folds = [Fold() for _ in range(count)]
    async with aclosing(replies) as events:
        async for place, event in events:
            folds[place].add(event)
    return folds


def logprobs_object(drawn: Sequence[Drawn]) -> dict[str, Any]:
    """The log-probabilities of a reply, or of a piece of it, as chat completions tell them."""
    return {
        "content": [{**_token(d.data, d.logprob), "top_logprobs": [_token(t.data, t.logprob) for t in d.top]} for d in drawn],
        "refusal": None,
    }


def _token(data: bytes, logprob: float) -> dict[str, Any]:
    return {"token": as_text(data), "logprob": at_least(logprob), "bytes": list(data)}


def as_text(data: bytes) -> str:
    """A token's bytes as text; a part of a character becomes U+FFFD."""
    return data.decode("utf-8", errors="replace")


def at_least(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return max(logprob, FLOOR)
