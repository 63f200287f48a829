"""The wire form of OpenAI's Responses API (wire.py has the manners; what sampling has in common with chat is `schema.Drawing`).

A conversation is a list of items: messages, calls of functions, what those gave, and references to items that are stored. What comes in
is what goes out: an item of a reply can be sent back as it came, and what is stored of a request is `Item.told`.

Source: `openai.types.responses.response_create_params` of openai 3.54.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from herd.chat import MOST_TOP_LOGPROBS
from herd.serve.schema import Drawing
from herd.serve.wire import Wire, holds, problem, shown_value

LOGPROBS = "message.output_text.logprobs"
Includable = Literal[
    "message.output_text.logprobs",
    # the rest adds to items that herd never makes, or has no effect since they are told anyhow
    "message.input_image.image_url",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
]


def _typed(known: Sequence[str], hint: str) -> BeforeValidator:
    """Look at an object's type before its fields, which would else be what is complained of."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and "type" in value and value["type"] not in known:
            text = f"is {shown_value(value['type'])}, which herd does not support; it takes {', '.join(known)}"
            raise problem(text, hint, field="type", code="unsupported_parameter")
        return value

    return BeforeValidator(check)


class Piece(Wire):
    """A piece of a message, or of what a function gave."""

    type: Literal["input_text", "input_image", "output_text", "refusal"]
    text: str | None = None
    image_url: str | None = None  # data: only; checked where it is read
    detail: Literal["auto", "low", "high", "original"] | None = None  # ignored: Llama 4 cuts an image by its size alone
    refusal: str | None = None

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"annotations": ([],), "file_id": ()}
    ignored = frozenset({"logprobs", "parsed", "prompt_cache_breakpoint"})  # parsed: what OpenAI's client adds

    @model_validator(mode="after")
    def _holds_its_type(self) -> Self:
        needed = {"input_image": "image_url", "refusal": "refusal"}.get(self.type, "text")
        holds(self, f"piece of type {self.type!r}", (needed,), ("detail",) if needed == "image_url" else ())
        return self

    def told(self) -> dict[str, Any]:
        """The piece as the API writes it."""
        more: dict[str, dict[str, Any]] = {"input_image": {"detail": self.detail or "auto"}, "output_text": {"annotations": []}}
        return {**self.model_dump(exclude_none=True), **more.get(self.type, {})}


_PIECES = ("input_text", "input_image", "output_text", "refusal")
Pieces = Annotated[list[Annotated[Piece, _typed(_PIECES, "send text as input_text, and images as input_image")]], Field(min_length=1)]


def _pieces(content: Any) -> Any:
    if isinstance(content, str):
        return [{"type": "input_text", "text": content}]
    if isinstance(content, list) or content is None:
        return content
    raise problem(f"is {shown_value(content)}; it must be a string or a list of pieces", "give the text")


class Item(Wire):
    """One item of a conversation."""

    type: Literal["message", "function_call", "function_call_output", "item_reference"]
    id: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: Annotated[Pieces | None, BeforeValidator(_pieces)] = None
    call_id: Annotated[str, Field(min_length=1)] | None = None
    name: str | None = None
    arguments: str | None = None
    output: Annotated[Pieces | None, BeforeValidator(_pieces)] = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None

    needs: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "message": ("role", "content"),
        "function_call": ("call_id", "name", "arguments"),
        "function_call_output": ("call_id", "output"),
        "item_reference": ("id",),
    }
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"async": (False,), "caller": ({"type": "direct"},), "namespace": ()}
    ignored = frozenset({"created_by", "parsed_arguments", "phase"})  # parsed_arguments: what OpenAI's client adds

    @model_validator(mode="after")
    def _holds_its_type(self) -> Self:
        more = {"message": ("id", "status"), "item_reference": ()}.get(self.type, ("id", "name", "status"))
        holds(self, f"{self.type} item", self.needs[self.type], more)
        for place, piece in enumerate(self.content or ()):
            is_said = piece.type in ("output_text", "refusal")
            if is_said and self.role != "assistant":
                raise problem(f"is {piece.type!r} in a message of the {self.role}", "give input_text", field=f"content.{place}.type")
            if piece.type == "input_image" and self.role != "user":
                text = f"is 'input_image' in a message of the {self.role}"
                raise problem(text, "images belong in the user's messages", field=f"content.{place}.type")
        if any(piece.type != "input_text" for piece in self.output or ()):
            hint = "what a function gives is text; put an image into a message of the user"
            raise problem("holds more than input_text", hint, field="output")
        return self

    def told(self, id: str) -> dict[str, Any]:
        """The item as the API writes it, under an id of its own if it has none."""
        told = {"id": self.id or id, **self.model_dump(exclude_none=True, exclude={"id", "content", "output"})}
        if self.content is not None:
            told["content"] = [piece.told() for piece in self.content]
        if self.output is not None:
            told["output"] = self.output[0].text if len(self.output) == 1 else [piece.told() for piece in self.output]
        return {"status": "completed", **told}


def _item(value: Any) -> Any:
    """Messages and references may come without their type, and text of the assistant as a string."""
    if not isinstance(value, dict):
        return value
    if value.get("type") is None:
        kind = "message" if "role" in value else "item_reference" if value.keys() <= {"id", "type"} else None
        if kind is None:
            raise problem("is missing", f"it is one of {', '.join(Item.needs)}", field="type")
        value = {**value, "type": kind}
    if value.get("role") == "assistant" and isinstance(value.get("content"), str):
        value = {**value, "content": [{"type": "output_text", "text": value["content"]}]}
    return value


def _items(value: Any) -> Any:
    if isinstance(value, str):
        return [{"type": "message", "role": "user", "content": value}]
    if isinstance(value, list):
        return value
    raise problem(f"is {shown_value(value)}; it must be a string or a list of items", "give the text of the user's message")


_ITEM_HINT = "leave out items of tools and of reasoning that herd does not have"


class ToolForm(Wire):
    """A function that the reply may call."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "allowed_callers": (["direct"],),
        "async": (False,),
        "defer_loading": (False,),
        "output_schema": (),
    }


class NamedTool(Wire):
    type: Literal["function"]
    name: str


class ChoiceForm(Wire):
    """Which tools a reply may or must call. A word stands for itself: "auto" is {"type": "auto"}."""

    type: Literal["auto", "none", "required", "function", "allowed_tools"]
    name: str | None = None
    mode: Literal["auto", "required"] | None = None
    tools: Annotated[list[NamedTool], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _holds_its_type(self) -> Self:
        needed = {"function": ("name",), "allowed_tools": ("mode", "tools")}.get(self.type, ())
        holds(self, f"choice of type {self.type!r}", needed)
        return self


def _choice(choice: Any) -> Any:
    words = ("auto", "none", "required")
    if isinstance(choice, str) and choice in words:
        return {"type": choice}
    if choice is None or (isinstance(choice, dict) and choice.get("type") in ("function", "allowed_tools")):
        return choice
    hint = 'it must be "auto", "none", "required", {"type": "function", ...} or {"type": "allowed_tools", ...}'
    raise problem(f"is {shown_value(choice)}", hint)


class FormatForm(Wire):
    """What the text of a reply must be."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    ignored = frozenset({"description"})

    @model_validator(mode="after")
    def _holds_its_type(self) -> Self:
        is_schema = self.type == "json_schema"
        for field, value in (("name", self.name), ("schema", self.schema_)):
            if (value is None) is is_schema:
                text = "is missing" if is_schema else f"stands in a format of type {self.type!r}"
                raise problem(text, "a format of type 'json_schema' holds name and schema, others do not", field=field)
        return self


class TextForm(Wire):
    format: FormatForm | None = None

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"verbosity": ("medium",)}


class Reasoning(Wire):
    """Llama 4 does none."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "context": ("auto",),
        "effort": ("none",),
        "generate_summary": (),
        "mode": ("standard",),
        "summary": (),
    }


class StreamOptions(Wire):
    ignored = frozenset({"include_obfuscation"})  # padding against eavesdroppers who count bytes


Metadata = Annotated[dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)]
_TOOL_HINT = "herd has no tools of its own: give functions, and call them yourself"

# fields of chat completions, which callers of this API often send, and what is meant here
MOVED = {
    "function_call": "give tool_choice",
    "functions": "give tools",
    "logprobs": f'give include: ["{LOGPROBS}"]',
    "max_completion_tokens": "give max_output_tokens",
    "max_tokens": "give max_output_tokens",
    "messages": "give input",
    "n": "send a request for each reply",
    "reasoning_effort": "give reasoning",
    "response_format": "give text.format",
    "verbosity": "give text",
}


class ResponsesBody(Drawing):
    """The body of POST /v1/responses."""

    model: str
    input: Annotated[
        Annotated[list[Annotated[Item, _typed(tuple(Item.needs), _ITEM_HINT), BeforeValidator(_item)]], Field(min_length=1)],
        BeforeValidator(_items),
    ]
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    include: list[Includable] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    text: TextForm | None = None
    tools: list[Annotated[ToolForm, _typed(("function",), _TOOL_HINT)]] | None = None
    tool_choice: Annotated[ChoiceForm | None, BeforeValidator(_choice)] = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    store: bool | None = None
    stream_options: StreamOptions | None = None
    metadata: Metadata | None = None  # these three are kept and told, and have no other effect
    safety_identifier: str | None = None
    user: str | None = None

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "access_programs": ({},),
        "background": (False,),
        "background_options": ({},),
        "context_management": ([],),
        "conversation": (),
        "image": ({}, {"context_compression": "auto"}, {"context_compression": "disabled"}),
        "moderation": (),
        "prompt": (),
        "service_tier": ("auto", "default"),
        "truncation": ("disabled",),
    }
    # max_tool_calls counts calls of OpenAI's own tools, which are refused
    ignored = frozenset({"max_tool_calls", "prompt_cache_options", "prompt_cache_retention"})

    @model_validator(mode="before")
    @classmethod
    def _is_not_of_chat(cls, data: Any) -> Any:
        for name, hint in MOVED.items():
            if isinstance(data, dict) and data.get(name) is not None:
                raise problem("is a field of chat completions", hint, field=name, code="unknown_parameter")
        return data

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise problem("is given, but stream is not true", "set stream, or leave stream_options out", field="stream_options")
        if self.top_logprobs and not self.with_logprobs:
            raise problem("is given, but include does not ask for log-probabilities", f"add {LOGPROBS} to include", field="top_logprobs")
        other = next((name for name in self.formats if getattr(self, name) is not None), None)
        if other and self.format.type != "text":
            raise problem("is given, and text.format too", "a reply has one format: give one of them", field=other)
        return self

    @property
    def with_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())

    @property
    def format(self) -> FormatForm:
        return (self.text and self.text.format) or FormatForm.model_validate({"type": "text"})
