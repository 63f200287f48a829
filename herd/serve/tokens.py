"""/tokenize and /detokenize, in vLLM's form: what the model reads."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

from fastapi import FastAPI, Request
from pydantic import Field, model_validator

from herd.chat import ChatRequest, TextBackend, TextRequest
from herd.serve.api import check_model
from herd.serve.choices import as_text
from herd.serve.config import ServeConfig
from herd.serve.connection import read_body
from herd.serve.fetch import fetched
from herd.serve.request import messages, tools
from herd.serve.schema import ChatMessage, FunctionTool
from herd.serve.wire import Wire, problem


class TokenizeBody(Wire):
    """The body of POST /tokenize: a text, or a conversation, whose prompt ends with the header of the reply."""

    model: str | None = None  # the first one
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    tools: list[FunctionTool] | None = None
    add_special_tokens: bool | None = None  # put the begin-of-text token before a text; a conversation always has it
    return_token_strs: bool | None = None

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "add_generation_prompt": (True,),
        "chat_template": (),
        "chat_template_kwargs": ({},),
        "continue_final_message": (False,),
        "mm_processor_kwargs": (),
    }

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if (self.prompt is None) is (self.messages is None):
            raise problem("has neither prompt nor messages" if self.prompt is None else "has both prompt and messages", "give one of them")
        if self.tools and self.messages is None:
            raise problem("is given without messages", "a text has no tools", field="tools")
        return self


class DetokenizeBody(Wire):
    """The body of POST /detokenize."""

    model: str | None = None
    tokens: list[int]


def add_tokens(app: FastAPI, backend: TextBackend, config: ServeConfig) -> None:
    """The routes."""

    def named(model: str | None) -> str:
        if model is None:
            return backend.models()[0]
        check_model(backend, model)
        return model

    @app.post("/tokenize")
    async def tokenize(request: Request) -> dict[str, Any]:
        body = await read_body(request, TokenizeBody, config.max_body_bytes)
        model = named(body.model)
        asked: ChatRequest | TextRequest
        if body.messages is not None:
            asked = ChatRequest(model=model, messages=messages(body.messages, await fetched(request, body)), tools=tools(body.tools))
        else:
            asked = TextRequest(model=model, prompt=body.prompt or "", begin=body.add_special_tokens is not False)
        found = await backend.tokenize(asked)
        strings = [as_text(piece) for piece in found.pieces] if body.return_token_strs else None
        return {"count": len(found.tokens), "max_model_len": found.context_tokens, "tokens": found.tokens, "token_strs": strings}

    @app.post("/detokenize")
    async def detokenize(request: Request) -> dict[str, str]:
        body = await read_body(request, DetokenizeBody, config.max_body_bytes)
        return {"prompt": await backend.detokenize(named(body.model), tuple(body.tokens))}
