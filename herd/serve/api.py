"""The routes of OpenAI's API: from a checked body to a `ChatRequest`, and from `ChatEvent`s to a reply.

There is one way through: the backend's streams. A reply that is not streamed is the same stream, folded.
"""

import time
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from herd.chat import Backend, TextBackend
from herd.errors import ModelNotFound, nearest
from herd.serve.choices import Told, folded, side_by_side
from herd.serve.config import ServeConfig
from herd.serve.connection import caller, is_background, meter, read_body, reply_to
from herd.serve.fetch import fetched
from herd.serve.metrics import Metrics
from herd.serve.replies import FINGERPRINT, chunks, completion
from herd.serve.request import chat_request, nth
from herd.serve.schema import ChatBody
from herd.serve.sse import EventStream
from herd.serve.wire import new_id


def add_openai_routes(app: FastAPI, backend: Backend, config: ServeConfig, metrics: Metrics) -> None:
    """Models and chat completions, under /v1."""
    created = int(time.time())

    def model(name: str) -> dict[str, Any]:
        check_model(backend, name)
        room = backend.context_tokens(name) if isinstance(backend, TextBackend) else None
        told = {} if room is None else {"context_length": room, "max_model_len": room}  # OpenRouter's word, and vLLM's
        return {"id": name, "object": "model", "created": created, "owned_by": "herd", **told}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model(name) for name in backend.models()]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        return model(name)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        body = await read_body(request, ChatBody, config.max_body_bytes)
        check_model(backend, body.model)
        asked = chat_request(body, caller(request), await fetched(request, body))
        asked = replace(asked, background=is_background(request))
        count = body.n or 1
        told = Told(body.model, metrics, meter(request))
        # the first reads the prompt, and the others take over what it has computed
        streams = [backend.chat(replace(asked, sampling=nth(asked.sampling, place))) for place in range(count)]
        replies = told.read(side_by_side(streams))
        reply = {"id": new_id("chatcmpl-"), "created": int(time.time()), "model": body.model, "system_fingerprint": FINGERPRINT}
        with_timings = bool(body.timings)
        if body.stream:
            with_usage = bool(body.stream_options and body.stream_options.include_usage)
            lines = chunks(replies, reply, told, count=count, with_usage=with_usage, with_timings=with_timings)
            return EventStream(lines, config)
        folds = await reply_to(request, folded(replies, count))
        return JSONResponse(completion(reply, folds, told, with_timings=with_timings))


def check_model(backend: Backend, name: str) -> None:
    """Raises `ModelNotFound`."""
    names = backend.models()
    if name not in names:
        hint = nearest(name, names) or f"served here: {', '.join(names)}"
        raise ModelNotFound(f"no model is called {name!r} here", hint, param="model")
