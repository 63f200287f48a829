"""/v1/embeddings: a text as a vector. Experimental: Llama 4 was never trained to tell texts apart by such vectors.

A vector is the mean of the model's last states, after the last norm, over all tokens of the text, the begin-of-text token included, scaled
to length 1 as OpenAI's are (`herd/engine/mean.py`).

Source: `openai.types.embedding_create_params` of openai 3.54; its client asks for base64 by itself.
"""

import asyncio
import base64
import struct
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BeforeValidator, Field

from herd.chat import Embedding, EmbeddingBackend, TextRequest
from herd.errors import ContextError, PromptError, UsageError
from herd.serve.access.limits import Meter
from herd.serve.api import check_model
from herd.serve.completions import texts_or_tokens
from herd.serve.config import ServeConfig
from herd.serve.connection import caller, is_background, meter, read_body, reply_to
from herd.serve.wire import Wire, problem

MOST_INPUTS = 2048  # of one request, OpenAI's limit
AT_ONCE = 8  # inputs of a request that stand in the engine's queue, so that others come in between


def _inputs(value: Any) -> Any:
    found = texts_or_tokens(value)
    if "" in found:
        raise problem("holds an empty text", "leave it out")
    return found


class EmbeddingBody(Wire):
    """The body of POST /v1/embeddings."""

    model: str
    input: Annotated[list[Any], BeforeValidator(_inputs), Field(max_length=MOST_INPUTS)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None  # only the model's own width

    ignored = frozenset({"user"})


def add_embeddings(app: FastAPI, backend: EmbeddingBackend, config: ServeConfig) -> None:
    """The route."""

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        body = await read_body(request, EmbeddingBody, config.max_body_bytes)
        check_model(backend, body.model)
        texts = [text if isinstance(text, str) else tuple(text) for text in body.input]
        background = is_background(request)
        asked = [TextRequest(model=body.model, prompt=text, cache_salt=caller(request), background=background) for text in texts]
        found = await reply_to(request, _embedded(backend, asked, body.dimensions, meter(request)))
        data = [
            {"object": "embedding", "index": index, "embedding": _written(one.vector, body.encoding_format)}
            for index, one in enumerate(found)
        ]
        total = sum(one.num_tokens for one in found)
        usage = {"prompt_tokens": total, "total_tokens": total}
        return JSONResponse({"object": "list", "data": data, "model": body.model, "usage": usage})


async def _embedded(
    backend: EmbeddingBackend, asked: Sequence[TextRequest], dimensions: int | None, meter: Meter | None
) -> list[Embedding]:
    """All vectors, in order. The first failure is that of all, and ends the others; those that were made are paid for."""
    places = asyncio.Semaphore(AT_ONCE)

    async def one(request: TextRequest) -> Embedding:
        async with places:
            found = await backend.embed(request)
        if meter:
            meter.used(found.num_tokens)
        if dimensions not in (None, len(found.vector)):
            message = f"dimensions is {dimensions}; vectors of this model have {len(found.vector):,}, and mean nothing when they are cut"
            raise UsageError(message, "leave dimensions out", param="dimensions")
        return found

    tasks = [asyncio.create_task(one(request)) for request in asked]
    try:
        return await asyncio.gather(*tasks)
    except (ContextError, PromptError) as error:
        error.param = "input"
        raise
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


def _written(vector: Sequence[float], form: str | None) -> list[float] | str:
    """Numbers, or base64 of them as float32, the lowest byte first."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode() if form == "base64" else list(vector)
