"""The two forms of a chat completion: whole, and as the chunks of a stream."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from herd import __version__
from herd.chat import ChatEvent, Done, Drawn, Fold, Progress, Text, ToolCallDelta, ToolCallStart
from herd.serve.choices import Replies, Told, logprobs_object
from herd.serve.sse import DONE, data

FINGERPRINT = f"herd-{__version__}"  # with which a seed gives the same reply again


def completion(reply: dict[str, Any], folds: Sequence[Fold], told: Told, *, with_timings: bool) -> dict[str, Any]:
    """OpenAI's chat completion object. reply: what it shares with chunks (id, created, model)."""
    choices = [_choice(index, fold) for index, fold in enumerate(folds)]
    timings = {"timings": told.timings()} if with_timings else {}
    return {**reply, "object": "chat.completion", "choices": choices, "usage": told.usage(), **timings}


def _choice(index: int, fold: Fold) -> dict[str, Any]:
    said = fold.message
    message: dict[str, Any] = {"role": "assistant", "content": said.text, "refusal": None}
    if said.tool_calls:
        message["content"] = said.text or None
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in said.tool_calls
        ]
    assert fold.done is not None
    logprobs = logprobs_object(fold.drawn) if fold.drawn else None
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": fold.done.reason}


async def chunks(
    replies: Replies, reply: dict[str, Any], told: Told, *, count: int, with_usage: bool, with_timings: bool
) -> AsyncGenerator[bytes, None]:
    """Replies as chunks: each one's role, its text and calls piece by piece, why it ended, then usage if asked for, and [DONE].

    Closes `replies`. reply: what all chunks share (id, created, model).
    """
    shared = {**reply, "object": "chat.completion.chunk"} | ({"usage": None} if with_usage else {})
    drawn: list[list[Drawn]] = [[] for _ in range(count)]  # not yet told, by reply
    begun: set[int] = set()

    def chunk(index: int, delta: dict[str, Any], reason: str | None = None, **more: Any) -> bytes:
        logprobs = logprobs_object(drawn[index]) if drawn[index] else None
        drawn[index].clear()
        return data({**shared, "choices": [{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}], **more})

    async with aclosing(replies) as events:
        async for index, event in events:
            if index not in begun:
                begun.add(index)
                yield chunk(index, {"role": "assistant", "content": None if isinstance(event, ToolCallStart) else ""})
            if isinstance(event, Drawn):
                drawn[index].append(event)
            elif isinstance(event, Progress):
                yield chunk(index, {}, prompt_progress=told.progress(event))
            elif isinstance(event, Done):
                is_last = len(told.ends) == count and not with_usage
                yield chunk(index, {}, event.reason, **({"timings": told.timings()} if with_timings and is_last else {}))
            elif delta := _delta(event):
                yield chunk(index, delta)
    if with_usage:
        timings = {"timings": told.timings()} if with_timings else {}
        yield data({**shared, "choices": [], "usage": told.usage(), **timings})
    yield DONE


def _delta(event: ChatEvent) -> dict[str, Any] | None:
    match event:
        case Text():
            return {"content": event.text}
        case ToolCallStart():
            function = {"name": event.name, "arguments": ""}
            return {"tool_calls": [{"index": event.index, "id": event.id, "type": "function", "function": function}]}
        case ToolCallDelta():
            return {"tool_calls": [{"index": event.index, "function": {"arguments": event.arguments}}]}
    return None
