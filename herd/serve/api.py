"""The routes of OpenAI's API: from a checked body to a `ChatRequest`, and from `ChatEvent`s to a reply.

There is one way through: the backend's stream. A reply that is not streamed is the same stream, folded.
"""

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from herd.chat import Backend, ChatEvent, ChatRequest, Done, Image, Message, Role, Sampling, Text
from herd.errors import ModelNotFound, PromptError, nearest
from herd.serve.config import ServeConfig
from herd.serve.connection import read_body, while_connected
from herd.serve.schema import ChatBody, ChatMessage
from herd.serve.sse import EventStream, chunks, usage_object
from herd.text.images import from_data_uri


def add_openai_routes(app: FastAPI, backend: Backend, config: ServeConfig) -> None:
    """What is served under /v1."""
    created = int(time.time())

    def model(name: str) -> dict[str, Any]:
        names = backend.models()
        if name not in names:
            hint = nearest(name, names) or f"served here: {', '.join(names)}"
            raise ModelNotFound(f"no model is called {name!r} here", hint, param="model")
        return {"id": name, "object": "model", "created": created, "owned_by": "herd"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model(name) for name in backend.models()]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        return model(name)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        body = await read_body(request, ChatBody, config.max_body_bytes)
        model(body.model)
        events = backend.chat(chat_request(body))
        reply = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
        if body.stream:
            with_usage = bool(body.stream_options and body.stream_options.include_usage)
            return EventStream(chunks(events, reply, with_usage=with_usage), config.ping_s)
        text, done = await while_connected(request.receive, fold(events))
        return JSONResponse({**reply, **completion(text, done)})


def chat_request(body: ChatBody) -> ChatRequest:
    """The request in herd's own words. Raises `UsageError` on a value out of range, `PromptError` on an image that cannot be read."""
    given = {
        "temperature": body.temperature,
        "top_k": body.top_k,
        "top_p": body.top_p,
        "min_p": body.min_p,
        "seed": body.seed,
        "max_tokens": body.max_completion_tokens or body.max_tokens,
        "stop": None if body.stop is None else tuple(body.stop),
        "ignore_eos": body.ignore_eos,
    }
    sampling = Sampling(**cast("dict[str, Any]", {name: value for name, value in given.items() if value is not None}))
    messages = tuple(_message(message, f"messages.{i}") for i, message in enumerate(body.messages))
    return ChatRequest(model=body.model, messages=messages, sampling=sampling, cache_salt=cache_salt(body))


def cache_salt(body: ChatBody) -> tuple[str, ...]:
    """Who shares computed prefixes with this request: those with the same words. Whose key the request came with belongs here too."""
    return () if body.prompt_cache_key is None else ("prompt_cache_key", body.prompt_cache_key)


def _message(message: ChatMessage, where: str) -> Message:
    role: Role = "system" if message.role == "developer" else message.role
    content: list[str | Image] = []
    for i, part in enumerate(message.content):
        if part.image_url is None:
            content.append(part.text or "")
            continue
        try:
            content.append(from_data_uri(part.image_url.url))  # never a path or an address: a client must not make the server read those
        except PromptError as error:
            hint = "send the image inside the request, as a data: URI such as data:image/png;base64,iVBOR..."
            raise PromptError(error.message, hint, param=f"{where}.content.{i}.image_url.url") from error
    return Message(role=role, content=tuple(content))


async def fold(events: AsyncGenerator[ChatEvent, None]) -> tuple[str, Done]:
    """A whole reply: its text and its end. Closes `events`."""
    pieces: list[str] = []
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Done):
                return "".join(pieces), event
            if isinstance(event, Text):
                pieces.append(event.text)
    raise AssertionError("the backend's stream ended without Done")


def completion(text: str, done: Done) -> dict[str, Any]:
    """OpenAI's chat completion object, but for what it shares with chunks."""
    message = {"role": "assistant", "content": text, "refusal": None}
    return {
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": done.reason}],
        "usage": usage_object(done.usage),
    }
