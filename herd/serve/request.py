"""From a checked body to a request in herd's own words."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from pydantic_core import from_json

from herd.chat import ChatRequest, Format, Image, Message, Role, Sampling, Tool, ToolCall, ToolChoice
from herd.errors import PromptError, UsageError
from herd.serve.schema import ChatBody, ChatMessage, Choice, Drawing, FunctionTool, ResponseFormat, StructuredOutputs
from herd.text.images import from_data_uri

SEEDS = 1 << 64
Images = Mapping[str, Image]
NONE: Images = {}


def chat_request(body: ChatBody, caller: tuple[str, ...] = (), images: Images = NONE) -> ChatRequest:
    """What a body asks for, once. Raises `UsageError` on a value out of range, `PromptError` on an image that cannot be read.

    caller: who asks; callers share no computed prefixes.  images: those that were fetched, by address.
    """
    return ChatRequest(
        model=body.model,
        messages=messages(body.messages, images),
        sampling=sampling(
            body,
            max_tokens=body.max_completion_tokens or body.max_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        ),
        cache_salt=cache_salt(body, caller),
        tools=tools(body.tools),
        progress=bool(body.return_progress),
        tool_choice=_tool_choice(body.tool_choice, parallel=body.parallel_tool_calls is not False),
    )


def messages(wire: Sequence[ChatMessage], images: Images = NONE) -> tuple[Message, ...]:
    """A conversation. Raises `PromptError` on an image that cannot be read."""
    return tuple(_message(message, f"messages.{i}", images) for i, message in enumerate(wire))


def tools(wire: Sequence[FunctionTool] | None) -> tuple[Tool, ...]:
    """What may be called. Raises `UsageError` on a name that cannot be."""
    return tuple(
        Tool(name=f.name, description=f.description or "", parameters=f.parameters or {}, strict=bool(f.strict))
        for f in (tool.function for tool in wire or ())
    )


def sampling(body: Drawing, **more: Any) -> Sampling:
    """How a reply is drawn: the fields that all bodies share, and `more`. What is None is left to `Sampling`."""
    given = {
        "temperature": body.temperature,
        "top_k": body.top_k,
        "top_p": body.top_p,
        "min_p": body.min_p,
        "seed": body.seed,
        "stop": None if body.stop is None else tuple(body.stop),
        "ignore_eos": body.ignore_eos,
        "frequency_penalty": body.frequency_penalty,
        "presence_penalty": body.presence_penalty,
        "repetition_penalty": body.repetition_penalty,
        "logit_bias": None if body.logit_bias is None else _logit_bias(body.logit_bias),
        "format": _format(body),
        **more,
    }
    return Sampling(**cast("dict[str, Any]", {name: value for name, value in given.items() if value is not None}))


def nth(sampling: Sampling, place: int) -> Sampling:
    """The sampling of one of several replies: a seed of its own, known from the first one's."""
    if sampling.seed is None or not place:
        return sampling
    return replace(sampling, seed=(sampling.seed + place + SEEDS // 2) % SEEDS - SEEDS // 2)


def cache_salt(body: Drawing, caller: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Who shares computed prefixes with this request: those with the same words."""
    return caller if body.prompt_cache_key is None else (*caller, "prompt_cache_key", body.prompt_cache_key)


def _logit_bias(biases: Mapping[str, float]) -> dict[int, float]:
    wrong = [token for token in biases if not token.isascii() or not token.isdigit() or len(token) > 10]
    if wrong:
        shown = ", ".join(f"{token!r:.60}" for token in wrong[:8]) + (" and more" if len(wrong) > 8 else "")
        raise UsageError(f"logit_bias has the key {shown}", "its keys are ids of tokens, as strings of digits", param="logit_bias")
    return {int(token): bias for token, bias in biases.items()}


def _format(body: Drawing) -> Format | None:
    """The one format that the body asks for; the wire form has seen to it that there is no second."""
    if isinstance(body, ChatBody) and body.response_format is not None and body.response_format.type != "text":
        return _response_format(body.response_format)
    if body.structured_outputs is not None:
        return _structured(body.structured_outputs)
    for name, schema in (("guided_json", body.guided_json), ("json_schema", body.json_schema)):
        if schema is not None:
            return Format(kind="json_schema", value=_schema(schema, name))
    if body.guided_regex is not None:
        return Format(kind="regex", value=body.guided_regex)
    if body.guided_choice is not None:
        return Format(kind="choice", value=tuple(body.guided_choice))
    grammar = body.grammar if body.guided_grammar is None else body.guided_grammar
    return None if grammar is None else Format(kind="gbnf", value=grammar)


def _response_format(form: ResponseFormat) -> Format:
    if form.schema_ is not None:
        return Format(kind="json_schema", value=form.schema_, strict=False)
    if form.json_schema is None:
        return Format(kind="json_object")
    schema = {"type": "object"} if form.json_schema.schema_ is None else form.json_schema.schema_
    return Format(kind="json_schema", value=schema, strict=bool(form.json_schema.strict))


def _structured(form: StructuredOutputs) -> Format:
    if form.json_ is not None:
        return Format(kind="json_schema", value=_schema(form.json_, "structured_outputs.json"))
    if form.regex is not None:
        return Format(kind="regex", value=form.regex)
    if form.choice is not None:
        return Format(kind="choice", value=tuple(form.choice))
    if form.grammar is not None:
        return Format(kind="gbnf", value=form.grammar)  # Lark is taken too, where it is not GBNF
    return Format(kind="json_object")


def _schema(schema: dict[str, Any] | str, param: str) -> dict[str, Any]:
    try:
        found = from_json(schema) if isinstance(schema, str) else schema  # which goes no deeper than bodies may
    except ValueError as error:
        raise UsageError(f"{param} is not JSON: {error}", "give a JSON schema, as an object or as its text", param=param) from error
    if not isinstance(found, dict):
        raise UsageError(f"{param} is {schema!r:.60}", "give a JSON schema, as an object or as its text", param=param)
    return found


def _tool_choice(choice: Choice | None, *, parallel: bool) -> ToolChoice:
    if choice is None:
        return ToolChoice(parallel=parallel)
    if choice.function is not None:
        return ToolChoice(mode="required", names=(choice.function.name,), parallel=parallel)
    if choice.allowed_tools is not None:
        names = tuple(tool.function.name for tool in choice.allowed_tools.tools)
        return ToolChoice(mode=choice.allowed_tools.mode, names=names, parallel=parallel)
    assert choice.type in ("auto", "none", "required")
    return ToolChoice(mode=choice.type, parallel=parallel)


def _message(message: ChatMessage, where: str, images: Images) -> Message:
    role: Role = "system" if message.role == "developer" else message.role
    content: list[str | Image] = []
    for i, part in enumerate(message.content or ()):
        place = f"{where}.content.{i}.image_url.url"
        content.append((part.text or "") if part.image_url is None else read_data_uri(part.image_url.url, place, images))
    calls = tuple(ToolCall(id=call.id, name=call.function.name, arguments=call.function.arguments) for call in message.tool_calls or ())
    return Message(role=role, content=tuple(content), tool_calls=calls, tool_call_id=message.tool_call_id)


def read_data_uri(uri: str, param: str, images: Images = NONE) -> Image:
    """An image inside a request, or one that was fetched (fetch.py). Never a path: a client must not make the server read those."""
    if uri in images:
        return images[uri]
    try:
        return from_data_uri(uri)
    except PromptError as error:
        hint = "send the image inside the request, as a data: URI such as data:image/png;base64,iVBOR..."
        hint += ", or start the server with --image-urls" if uri[:8].lower().startswith(("http://", "https://")) else ""
        raise PromptError(error.message, hint, param=param) from error
