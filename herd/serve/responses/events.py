"""A response in the making: chat events go in, the Responses API's events come out.

    response.created, response.in_progress
    a message:  output_item.added, content_part.added, output_text.delta ..., output_text.done, content_part.done, output_item.done
    a call:     output_item.added, function_call_arguments.delta ..., function_call_arguments.done, output_item.done
    response.completed or response.incomplete

They are numbered from 0. The last holds the whole response, which is the reply where none is streamed. A call that the token limit cuts
off has no function_call_arguments.done, so that nobody makes it.

Source: `openai.types.responses.response_stream_event` of openai 3.54. An error event has its fields twice: at its top, as documented, and
in `error`, as OpenAI sends them and as its clients look for them to raise.
"""

import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from typing import Any

from herd.chat import ChatEvent, Done, Drawn, Text, ToolCallDelta, ToolCallEnd, ToolCallStart, Usage
from herd.errors import HerdError
from herd.serve.choices import Replies, logprobs_object
from herd.serve.errors import error_object
from herd.serve.sse import data
from herd.serve.wire import new_id

Event = dict[str, Any]


def line(event: Event) -> bytes:
    """An event on the wire."""
    return data(event, event=event["type"])


class Answer:
    """One response."""

    def __init__(self, head: dict[str, Any], finish: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """head: what the response tells whatever happens.  finish: called with it when it is whole; gives what is told of it."""
        self._head, self._finish = head, finish
        self._number = 0  # of the next event
        self._output: list[dict[str, Any]] = []  # items that are whole
        self._item: dict[str, Any] | None = None  # the one in the making
        self._pieces: list[str] = []  # of its text or its arguments
        self._logprobs: list[dict[str, Any]] = []  # of its text
        self._drawn: list[Drawn] = []  # tokens whose text has not come yet

    async def events(self, replies: Replies) -> AsyncGenerator[Event, None]:
        """All of them. Closes `replies`."""
        async with aclosing(replies) as events:
            async for _, event in events:
                if not self._number:  # not before the model has begun, so that a prompt which is too long is a plain 400
                    for kind in ("response.created", "response.in_progress"):
                        yield self._event(kind, response=self._response("in_progress"))
                for told in self._read(event):
                    yield told

    def failure(self, error: HerdError) -> bytes:
        """The lines that end a stream which has failed."""
        told = error_object(error)["error"]
        lines = b""
        if self._number:
            code = {400: "invalid_prompt", 429: "rate_limit_exceeded"}.get(error.http_status, "server_error")
            failed = self._response("failed", error={"code": code, "message": told["message"]})
            lines = line(self._event("response.failed", response=failed))
        flat = {"code": told["code"] or told["type"], "message": told["message"], "param": told["param"]}
        return lines + line(self._event("error", **flat, error=told))

    def _event(self, kind: str, **fields: Any) -> Event:
        number, self._number = self._number, self._number + 1
        return {"type": kind, "sequence_number": number, **fields}

    def _here(self, kind: str, **fields: Any) -> Event:
        """An event about the item in the making."""
        assert self._item is not None
        return self._event(kind, item_id=self._item["id"], output_index=len(self._output), **fields)

    def _response(self, status: str, **fields: Any) -> dict[str, Any]:
        empty = {"completed_at": None, "error": None, "incomplete_details": None, "usage": None}
        return {**self._head, **empty, "status": status, "output": list(self._output), **fields}

    def _read(self, event: ChatEvent) -> Iterator[Event]:
        match event:
            case Drawn():
                self._drawn.append(event)
            case Text():
                if self._item is None or self._item["type"] != "message":
                    yield from self._begin(type="message", role="assistant", content=[])
                self._pieces.append(event.text)
                logprobs = self._take_logprobs()
                yield self._here("response.output_text.delta", content_index=0, delta=event.text, logprobs=logprobs)
            case ToolCallStart():
                yield from self._begin(type="function_call", call_id=event.id, name=event.name, arguments="")
            case ToolCallDelta():
                self._pieces.append(event.arguments)
                yield self._here("response.function_call_arguments.delta", delta=event.arguments)
            case ToolCallEnd():
                yield from self._end("completed")
            case Done():
                yield from self._done(event)

    def _begin(self, **fields: Any) -> Iterator[Event]:
        yield from self._end("completed")
        is_message = fields["type"] == "message"
        self._item = {"id": new_id("msg_" if is_message else "fc_"), "status": "in_progress", **fields}
        yield self._event("response.output_item.added", output_index=len(self._output), item=self._item)
        if is_message:
            yield self._here("response.content_part.added", content_index=0, part=_part("", []))

    def _end(self, status: str) -> Iterator[Event]:
        """The item in the making is whole, or was cut off."""
        if self._item is None:
            return
        whole = "".join(self._pieces)
        if self._item["type"] == "message":
            part = _part(whole, self._logprobs)
            yield self._here("response.output_text.done", content_index=0, text=whole, logprobs=self._logprobs)
            yield self._here("response.content_part.done", content_index=0, part=part)
            item = {**self._item, "status": status, "content": [part]}
        else:
            if status == "completed":
                yield self._here("response.function_call_arguments.done", arguments=whole)
            item = {**self._item, "status": status, "arguments": whole}
            self._drawn.clear()  # the tokens of a call, and of what led to it, are no text
        index = len(self._output)
        self._output.append(item)
        self._item, self._pieces, self._logprobs = None, [], []
        yield self._event("response.output_item.done", output_index=index, item=item)

    def _done(self, done: Done) -> Iterator[Event]:
        if self._item is None and not self._output:
            yield from self._begin(type="message", role="assistant", content=[])
        if self._item is not None and self._item["type"] == "message":
            self._take_logprobs()  # of tokens that a stop string cut from the text
        status = "incomplete" if done.reason == "length" else "completed"
        yield from self._end(status)
        how: dict[str, Any] = {"completed_at": int(time.time())}
        if status == "incomplete":
            how = {"incomplete_details": {"reason": "max_output_tokens"}}
        yield self._event(f"response.{status}", response=self._finish(self._response(status, usage=_usage(done.usage), **how)))

    def _take_logprobs(self) -> list[dict[str, Any]]:
        """The log-probabilities of the tokens drawn since they were last taken."""
        told: list[dict[str, Any]] = logprobs_object(self._drawn)["content"]
        self._logprobs += told
        self._drawn.clear()
        return told


def _part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "annotations": [], "logprobs": logprobs, "text": text}


def _usage(usage: Usage) -> dict[str, Any]:
    images = {"image_tokens": usage.image_tokens} if usage.image_tokens else {}  # which OpenAI tells in chat completions alone
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0, **images},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
