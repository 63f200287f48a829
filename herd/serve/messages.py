"""Anthropic's /v1/messages, which coding agents speak: another wire form of the same requests and the same events.

Source: `anthropic.types.message_create_params` and the streaming events of anthropic 2.13. temperature, top_p and top_k have left that
package, but clients still send them.
"""

import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Annotated, Any, ClassVar, Literal, Self

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BeforeValidator, Field, model_validator

from herd.chat import (
    Backend,
    ChatRequest,
    Done,
    Fold,
    Format,
    Image,
    Message,
    Sampling,
    Text,
    TextBackend,
    Tool,
    ToolCall,
    ToolCallDelta,
    ToolCallStart,
    ToolChoice,
    Usage,
)
from herd.serve.api import check_model
from herd.serve.choices import Replies, Told, folded, side_by_side
from herd.serve.config import ServeConfig
from herd.serve.connection import caller, meter, read_body, reply_to
from herd.serve.fetch import fetched
from herd.serve.metrics import Metrics
from herd.serve.request import NONE, Images, read_data_uri
from herd.serve.sse import EventStream, data
from herd.serve.wire import Wire, holds, new_id, problem, shown_value

REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class Source(Wire):
    """An image: its bytes, or its address, which is read where the server was told to."""

    type: Literal["base64", "url"]
    media_type: str | None = None
    data: str | None = None
    url: str | None = None

    @model_validator(mode="after")
    def _holds_its_type(self) -> Self:
        holds(self, f"source of type {self.type!r}", ("url",) if self.type == "url" else ("media_type", "data"))
        return self


def _blocks(content: Any) -> Any:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if isinstance(content, list) or content is None:
        return content
    raise problem(f"is {shown_value(content)}; it must be a string or a list of blocks", "give the text of the message")


class Block(Wire):
    """A piece of a message: text, an image, a call of a tool, or what it gave."""

    type: Literal["text", "image", "tool_use", "tool_result"]
    text: str | None = None
    source: Source | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: Annotated[list["Block"] | None, BeforeValidator(_blocks)] = None
    is_error: bool | None = None

    needs: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "text": ("text",),
        "image": ("source",),
        "tool_use": ("id", "name", "input"),
        "tool_result": ("tool_use_id",),
    }
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"caller": ({"type": "direct"},), "toolset_name": (), "transformations": ([],)}
    ignored = frozenset({"cache_control", "citations"})

    @model_validator(mode="after")
    def _holds_its_type(self) -> Self:
        own = ("content", "is_error") if self.type == "tool_result" else ()
        holds(self, f"block of type {self.type!r}", self.needs[self.type], own)
        if any(block.type != "text" for block in self.content or ()):
            raise problem("holds more than text", "what a tool gives is text", field="content")
        return self


class Turn(Wire):
    role: Literal["user", "assistant", "system"]
    content: Annotated[Annotated[list[Block], Field(min_length=1)], BeforeValidator(_blocks)]

    @model_validator(mode="after")
    def _fits_its_role(self) -> Self:
        kinds = [block.type for block in self.content]
        if self.role != "assistant" and "tool_use" in kinds:
            raise problem("holds a tool_use block", "only the assistant calls tools", field="content")
        if self.role != "user" and "tool_result" in kinds:
            raise problem("holds a tool_result block", "put it into a message of the user", field="content")
        if "tool_result" in kinds[kinds.count("tool_result") :]:
            raise problem("has something before a tool_result block", "put the results first", field="content")
        return self


class ToolForm(Wire):
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "allowed_callers": (["direct"],),
        "defer_loading": (False,),
        "input_examples": ([],),
        "type": ("custom",),
    }
    ignored = frozenset({"cache_control", "eager_input_streaming"})


class ToolChoiceForm(Wire):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _holds_its_type(self) -> Self:
        if (self.name is None) is (self.type == "tool"):
            raise problem(f"is {shown_value(self.name)} in a choice of type {self.type!r}", "type 'tool' has a name", field="name")
        return self


class FormatForm(Wire):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputForm(Wire):
    """What the text of a reply must be. All of a schema is enforced, or it is refused, as Anthropic's server does it."""

    format: FormatForm | None = None

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"effort": ("high",)}  # the default


class CountBody(Wire):
    """The body of POST /v1/messages/count_tokens: what of a request is read."""

    model: str
    messages: Annotated[list[Turn], Field(min_length=1)]
    system: Annotated[list[Block] | None, BeforeValidator(_blocks)] = None
    tools: list[ToolForm] | None = None
    tool_choice: ToolChoiceForm | None = None
    output_config: OutputForm | None = None

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "speed": ("standard",),
        "thinking": ({"type": "disabled"},),
        "user_profile_id": (),
        "workspace_id": (),
    }
    ignored = frozenset({"cache_control"})

    def request(self, sampling: Sampling, who: tuple[str, ...] = (), images: Images = NONE) -> ChatRequest:
        """The request in herd's own words."""
        turns = [_joined(self.system)] if self.system else []
        turns += [message for i, turn in enumerate(self.messages) for message in _messages(turn, f"messages.{i}", images)]
        tools = tuple(
            Tool(name=t.name, description=t.description or "", parameters=t.input_schema, strict=bool(t.strict)) for t in self.tools or ()
        )
        return ChatRequest(
            model=self.model, messages=tuple(turns), sampling=sampling, cache_salt=who, tools=tools, tool_choice=_choice(self.tool_choice)
        )


class MessagesBody(CountBody):
    """The body of POST /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **CountBody.neutral,
        "container": (),
        "diagnostics": (),
        "inference_geo": (),
        "service_tier": ("auto", "standard_only"),
    }
    ignored = CountBody.ignored | {"metadata"}

    def sampling(self) -> Sampling:
        """How the reply is drawn."""
        asked = self.output_config and self.output_config.format
        return Sampling(
            max_tokens=self.max_tokens,
            stop=tuple(self.stop_sequences or ()),
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k or 0,
            format=Format(kind="json_schema", value=asked.schema_) if asked else None,
        )


def _joined(blocks: list[Block]) -> Message:
    return Message(role="system", content=tuple(block.text or "" for block in blocks))


def _messages(turn: Turn, where: str, images: Images) -> list[Message]:
    """A turn in herd's own words: results of tools are messages of their own."""
    made: list[Message] = []
    content: list[str | Image] = []
    calls: list[ToolCall] = []
    for i, block in enumerate(turn.content):
        if block.type == "tool_result":
            text = "".join(part.text or "" for part in block.content or ())
            said = f"Error: {text}" if block.is_error else text  # prompts have no other place for it
            made.append(Message(role="tool", content=(said,), tool_call_id=block.tool_use_id))
        elif block.type == "tool_use":
            calls.append(ToolCall(id=block.id or "", name=block.name or "", arguments=json.dumps(block.input, ensure_ascii=False)))
        elif block.source is not None:
            source, place = block.source, f"{where}.content.{i}.source"
            uri = source.url or f"data:{source.media_type};base64,{source.data}"
            content.append(read_data_uri(uri, f"{place}.url" if source.url else f"{place}.data", images))
        else:
            content.append(block.text or "")
    if content or calls:
        made.append(Message(role=turn.role, content=tuple(content), tool_calls=tuple(calls)))
    return made


def _choice(choice: ToolChoiceForm | None) -> ToolChoice:
    if choice is None:
        return ToolChoice()
    parallel = not choice.disable_parallel_tool_use
    if choice.type in ("any", "tool"):
        return ToolChoice(mode="required", names=(choice.name,) if choice.name else (), parallel=parallel)
    return ToolChoice(mode="none" if choice.type == "none" else "auto", parallel=parallel)


def add_messages(app: FastAPI, backend: Backend, config: ServeConfig, metrics: Metrics) -> None:
    """The routes."""

    @app.post("/v1/messages")
    async def messages(request: Request) -> Response:
        body = await read_body(request, MessagesBody, config.max_body_bytes)
        check_model(backend, body.model)
        told = Told(body.model, metrics, meter(request))
        asked = body.request(body.sampling(), caller(request), await fetched(request, body))
        replies = told.read(side_by_side([backend.chat(asked)]))
        reply = {"id": new_id("msg_"), "type": "message", "role": "assistant", "model": body.model, "stop_sequence": None}
        if body.stream:
            return EventStream(_lines(replies, reply, lambda: _prompt_tokens(backend, asked)), config)
        [fold] = await reply_to(request, folded(replies, 1))
        return JSONResponse({**reply, **_whole(fold)})

    if isinstance(backend, TextBackend):

        @app.post("/v1/messages/count_tokens")
        async def count_tokens(request: Request) -> dict[str, int]:
            body = await read_body(request, CountBody, config.max_body_bytes)
            check_model(backend, body.model)
            found = await backend.tokenize(body.request(Sampling(), images=await fetched(request, body)))
            return {"input_tokens": len(found.tokens)}


def _whole(fold: Fold) -> dict[str, Any]:
    assert fold.done is not None
    said = fold.message
    content: list[dict[str, Any]] = [{"type": "text", "text": said.text}] if said.text else []
    content += [{"type": "tool_use", "id": call.id, "name": call.name, "input": _input(call.arguments)} for call in said.tool_calls]
    return {"content": content, **_end(fold.done), "usage": _usage(fold.done.usage)}


def _end(done: Done) -> dict[str, Any]:
    """Why the reply ended."""
    return {"stop_reason": REASONS[done.reason] if done.stop is None else "stop_sequence", "stop_sequence": done.stop}


def _input(arguments: str) -> Any:
    """A call's arguments; {} for one that was cut off by the token limit."""
    try:
        return json.loads(arguments)
    except ValueError:
        return {}


def _usage(usage: Usage) -> dict[str, int]:
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion_tokens,
    }


async def _prompt_tokens(backend: Backend, request: ChatRequest) -> int:
    return len((await backend.tokenize(request)).tokens) if isinstance(backend, TextBackend) else 0


async def _lines(replies: Replies, reply: dict[str, Any], prompt_tokens: Callable[[], Awaitable[int]]) -> AsyncGenerator[bytes, None]:
    """The reply as Anthropic's events: blocks one after the other, each with a start, pieces and an end. Closes `replies`.

    prompt_tokens: told at the start; how many of them were cached is known at the end.
    """

    def line(kind: str, **fields: Any) -> bytes:
        return data({"type": kind, **fields}, event=kind)

    def piece(kind: str, field: str, text: str) -> bytes:
        return line("content_block_delta", index=index, delta={"type": kind, field: text})

    index, has_begun, is_open, is_text = -1, False, False, False
    async with aclosing(replies) as events:
        num_prompt = await prompt_tokens()
        async for _, event in events:
            if not has_begun:
                empty: dict[str, Any] = {
                    "content": [],
                    "stop_reason": None,
                    "usage": _usage(Usage(prompt_tokens=num_prompt, completion_tokens=0)),
                }
                yield line("message_start", message={**reply, **empty})
                has_begun = True
            begins = isinstance(event, ToolCallStart) or (isinstance(event, Text) and not is_text)
            if is_open and (begins or isinstance(event, Done)):
                yield line("content_block_stop", index=index)
            if begins:
                index, is_open, is_text = index + 1, True, isinstance(event, Text)
                block: dict[str, Any] = {"type": "text", "text": ""}
                if isinstance(event, ToolCallStart):
                    block = {"type": "tool_use", "id": event.id, "name": event.name, "input": {}}
                yield line("content_block_start", index=index, content_block=block)
            match event:
                case Text():
                    yield piece("text_delta", "text", event.text)
                case ToolCallDelta():
                    yield piece("input_json_delta", "partial_json", event.arguments)
                case Done():
                    yield line("message_delta", delta=_end(event), usage=_usage(event.usage))
    yield line("message_stop")
