"""OpenAI's older API, /v1/completions: texts or tokens go on, without a conversation around them.

Source: `openai.types.completion_create_params` of openai 3.54.
"""

import codecs
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Annotated, Any, ClassVar, Self

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BeforeValidator, Field, model_validator

from herd.chat import MOST_TOP_LOGPROBS, Done, Drawn, Fold, Text, TextBackend, TextRequest, TopToken
from herd.serve.api import check_model
from herd.serve.choices import Replies, Told, at_least, folded, side_by_side
from herd.serve.config import ServeConfig
from herd.serve.connection import caller, is_background, meter, read_body, reply_to
from herd.serve.metrics import Metrics
from herd.serve.replies import FINGERPRINT
from herd.serve.request import cache_salt, nth, sampling
from herd.serve.schema import Sampled
from herd.serve.sse import DONE, EventStream, data
from herd.serve.wire import new_id, problem, shown_value

MOST_REPLIES = 2048  # of one request: prompts times n
DEFAULT_TOKENS = 16  # OpenAI's default of max_tokens here


def texts_or_tokens(prompt: Any) -> Any:
    """Always a list of texts and lists of tokens."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(item, str) or _are_tokens(item) for item in prompt):
            return prompt
        if _are_tokens(prompt):
            return [prompt]
    raise problem(f"is {shown_value(prompt)}; it must be a text, a list of token ids, or a list of these", "give the text to go on from")


def _are_tokens(item: Any) -> bool:
    return isinstance(item, list) and bool(item) and all(isinstance(token, int) and not isinstance(token, bool) for token in item)


class CompletionBody(Sampled):
    """The body of POST /v1/completions."""

    prompt: Annotated[list[Any], BeforeValidator(texts_or_tokens)]
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    echo: bool | None = None

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {**Sampled.neutral, "best_of": (1,), "suffix": ("",)}
    ignored = frozenset({"user"})

    @model_validator(mode="after")
    def _can_be_done(self) -> Self:
        if self.echo and self.logprobs is not None:
            raise problem("is true, and logprobs are asked for too; those of a prompt are not told", "leave one out", field="echo")
        if len(self.prompt) * (self.n or 1) > MOST_REPLIES:
            text = f"has {len(self.prompt)} prompts, {self.n or 1} replies each; the limit is {MOST_REPLIES} in all"
            raise problem(text, "send several requests", field="prompt")
        return self

    def requests(self, who: tuple[str, ...], *, background: bool = False) -> list[TextRequest]:
        """One for each reply, those to the same prompt side by side."""
        drawn = sampling(self, max_tokens=self.max_tokens or DEFAULT_TOKENS, logprobs=self.logprobs)
        salt = cache_salt(self, who)
        prompts = [prompt if isinstance(prompt, str) else tuple(prompt) for prompt in self.prompt]
        return [
            TextRequest(model=self.model, prompt=prompt, sampling=nth(drawn, place), cache_salt=salt, background=background)
            for prompt in prompts
            for place in range(self.n or 1)
        ]


def add_completions(app: FastAPI, backend: TextBackend, config: ServeConfig, metrics: Metrics) -> None:
    """The route."""

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = await read_body(request, CompletionBody, config.max_body_bytes)
        check_model(backend, body.model)
        asked = body.requests(caller(request), background=is_background(request))
        said = [await _text(backend, one) if body.echo else "" for one in asked]
        told = Told(body.model, metrics, meter(request))
        replies = told.read(side_by_side([backend.complete(one) for one in asked]))
        reply = {"id": new_id("cmpl-"), "object": "text_completion", "created": int(time.time()), "model": body.model}
        reply["system_fingerprint"] = FINGERPRINT
        if body.stream:
            return EventStream(_chunks(replies, reply, told, body, said), config)
        folds = await reply_to(request, folded(replies, len(asked)))
        choices = [_choice(index, fold, said[index]) for index, fold in enumerate(folds)]
        timings = {"timings": told.timings(len(body.prompt))} if body.timings else {}
        return JSONResponse({**reply, "choices": choices, "usage": told.usage(len(body.prompt)), **timings})


async def _text(backend: TextBackend, request: TextRequest) -> str:
    return request.prompt if isinstance(request.prompt, str) else await backend.detokenize(request.model, request.prompt)


def _choice(index: int, fold: Fold, said: str) -> dict[str, Any]:
    assert fold.done is not None
    logprobs = Table().read(fold.drawn) if fold.drawn else None
    return {"index": index, "text": said + fold.message.text, "logprobs": logprobs, "finish_reason": fold.done.reason}


async def _chunks(
    replies: Replies, reply: dict[str, Any], told: Told, body: CompletionBody, said: Sequence[str]
) -> AsyncGenerator[bytes, None]:
    with_usage = bool(body.stream_options and body.stream_options.include_usage)
    shared = reply | ({"usage": None} if with_usage else {})
    tables = [Table() for _ in said]
    drawn: list[list[Drawn]] = [[] for _ in said]  # not yet told

    def chunk(index: int, text: str, reason: str | None = None) -> bytes:
        logprobs = tables[index].read(drawn[index]) if drawn[index] else None
        drawn[index].clear()
        return data({**shared, "choices": [{"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}]})

    begun: set[int] = set()
    async with aclosing(replies) as events:
        async for index, event in events:
            if said[index] and index not in begun:
                begun.add(index)
                yield chunk(index, said[index])
            match event:
                case Drawn():
                    drawn[index].append(event)
                case Text():
                    yield chunk(index, event.text)
                case Done():
                    yield chunk(index, "", event.reason)
    if with_usage or body.timings:
        last: dict[str, Any] = {**shared, "choices": []}
        last |= {"usage": told.usage(len(body.prompt))} if with_usage else {}
        yield data(last | ({"timings": told.timings(len(body.prompt))} if body.timings else {}))
    yield DONE


class Table:
    """Log-probabilities as completions tell them: in columns, and with where in the text each token begins."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0  # characters

    def read(self, drawn: Sequence[Drawn]) -> dict[str, Any]:
        """The next rows. The token itself is among the likeliest, as OpenAI tells it: one more where it is none of them."""
        offsets = []
        for token in drawn:
            offsets.append(self._offset)
            self._offset += len(self._utf8.decode(token.data))
        return {
            "tokens": [_name(token.data) for token in drawn],
            "token_logprobs": [at_least(token.logprob) for token in drawn],
            "top_logprobs": [_likeliest(token) for token in drawn],
            "text_offset": offsets,
        }


def _likeliest(token: Drawn) -> dict[str, float]:
    told: list[TopToken | Drawn] = [*token.top, token]
    return {_name(each.data): at_least(each.logprob) for each in told}


def _name(data: bytes) -> str:
    """A token's text; one that is a part of a character as OpenAI writes it, bytes:\\xe2\\x98."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
