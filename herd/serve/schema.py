"""The wire form of OpenAI's chat completions. It takes what herd honours and refuses the rest by name (wire.py has the manners).

An absent field and null mean the same: the default of `herd.chat.Sampling`, which for temperature and top_p is what the makers advise.
What values may be is checked where they are used, in `Sampling`; here are only the limits of the wire form itself.

Source: `openai.types.chat.completion_create_params` of openai 3.54; for `structured_outputs` and `guided_*` vLLM's protocol.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from herd.chat import MOST_TOP_LOGPROBS
from herd.serve.wire import Wire, holds, problem, shown_value

MOST_CHOICES = 128  # replies to one prompt, OpenAI's limit


class ImageUrl(Wire):
    url: str  # data: only; checked where it is read
    detail: Literal["auto", "low", "high", "original"] | None = None  # ignored: Llama 4 cuts an image by its size alone


class Part(Wire):
    """A piece of a message: text or an image."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | None = None

    ignored = frozenset({"prompt_cache_breakpoint"})

    @model_validator(mode="after")
    def _holds_its_type(self) -> Self:
        holds(self, f"part of type {self.type!r}", (self.type,))
        return self


class CalledFunction(Wire):
    name: str
    arguments: str

    ignored = frozenset({"parsed_arguments"})  # what OpenAI's client adds to the calls that it has parsed


class Call(Wire):
    """A call in the history."""

    id: str
    type: Literal["function"]
    function: CalledFunction

    ignored = frozenset({"index"})  # of streamed calls, which clients put together and send back


def _parts(content: Any) -> Any:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if isinstance(content, list) or content is None:
        return content
    raise problem(f"is {shown_value(content)}; it must be a string or a list of parts", "give the text of the message")


class ChatMessage(Wire):
    """One turn. The neutral fields are those of OpenAI's own replies, which clients send back as they came."""

    role: Literal["developer", "system", "user", "assistant", "tool"]  # developer is OpenAI's newer word for system
    content: Annotated[Annotated[list[Part], Field(min_length=1)] | None, BeforeValidator(_parts)] = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "annotations": ([],),
        "audio": (),
        "function_call": (),
        "refusal": (),
    }
    ignored = frozenset({"name", "parsed"})  # parsed: what OpenAI's client adds to the replies that it has parsed

    @model_validator(mode="after")
    def _fits_its_role(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise problem(f"stands in a message of role {self.role!r}", "only the assistant calls tools", field="tool_calls")
        if (self.tool_call_id is not None) is not (self.role == "tool"):
            text = "is missing" if self.role == "tool" else f"stands in a message of role {self.role!r}"
            raise problem(text, "give it in messages of role 'tool', and only there", field="tool_call_id")
        if self.content is None and not self.tool_calls:
            text = "is null; it must be a string or a list of parts" if "content" in self.model_fields_set else "is missing"
            raise problem(text, "give the text of the message", field="content")
        if self.role == "tool" and any(part.type != "text" for part in self.content or ()):
            raise problem("holds an image", "what a tool gives is text; put the image into a message of the user", field="content")
        return self


class StreamOptions(Wire):
    include_usage: bool | None = None

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"continuous_usage_stats": (False,)}  # vLLM's
    ignored = frozenset({"include_obfuscation"})  # padding against eavesdroppers who count bytes


class Function(Wire):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTool(Wire):
    """A tool that a reply may call."""

    type: Literal["function"]
    function: Function


class FunctionName(Wire):
    name: str


class NamedTool(Wire):
    type: Literal["function"]
    function: FunctionName


class AllowedTools(Wire):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1)]


class Choice(Wire):
    """Which tools a reply may or must call. A word stands for itself: "auto" is {"type": "auto"}."""

    type: Literal["auto", "none", "required", "function", "allowed_tools"]
    function: FunctionName | None = None
    allowed_tools: AllowedTools | None = None

    @model_validator(mode="after")
    def _holds_its_type(self) -> Self:
        for field in ("function", "allowed_tools"):
            if (getattr(self, field) is None) is (self.type == field):
                text = "is missing" if self.type == field else f"stands in a choice of type {self.type!r}"
                raise problem(text, f"a choice of type {field!r} holds {field}", field=field)
        return self


def _choice(choice: Any) -> Any:
    words = ("auto", "none", "required")
    if isinstance(choice, str):
        if choice in words:
            return {"type": choice}
    elif choice is None or (isinstance(choice, dict) and choice.get("type") not in words):
        return choice
    hint = 'it must be "auto", "none", "required", {"type": "function", ...} or {"type": "allowed_tools", ...}'
    raise problem(f"is {shown_value(choice)}", hint)


class JsonSchema(Wire):
    name: str
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    ignored = frozenset({"description"})


class ResponseFormat(Wire):
    """What the text of a reply must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")  # llama.cpp's way to say what the object must be

    @model_validator(mode="after")
    def _holds_its_type(self) -> Self:
        if (self.json_schema is None) is (self.type == "json_schema"):
            text = "is missing" if self.json_schema is None else f"stands in a format of type {self.type!r}"
            raise problem(text, "a format of type 'json_schema' holds json_schema, others do not", field="json_schema")
        if self.schema_ is not None and self.type != "json_object":
            raise problem(f"stands in a format of type {self.type!r}", "put it into json_schema, of type 'json_schema'", field="schema")
        return self


_ANY_TEXT = ResponseFormat.model_validate({"type": "text"})


class StructuredOutputs(Wire):
    """vLLM's word for the same, with more kinds. One of them."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")  # a schema, or its text
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1)] | None = None
    grammar: str | None = None  # GBNF or Lark
    json_object: bool | None = None

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "disable_additional_properties": (False,),
        "disable_any_whitespace": (True,),  # there never is any but one space after ":" and ","
        "disable_fallback": (True, False),
        "structural_tag": (),
        "whitespace_pattern": (),
    }

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        given = [name for name in self.honoured() if getattr(self, "json_" if name == "json" else name) not in (None, False)]
        if len(given) != 1:
            raise problem(f"holds {' and '.join(given) or 'nothing'}", f"give one of {', '.join(self.honoured())}")
        return self


def _strings(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


class Drawing(Wire):
    """What requests for a reply have in common in all of OpenAI's APIs: how it is drawn."""

    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None  # reply i of n has seed + i
    stop: Annotated[Annotated[list[str], Field(max_length=4)] | None, BeforeValidator(_strings)] = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stream: bool | None = None
    prompt_cache_key: str | None = None  # OpenAI routes by it; here, only requests with the same key share computed prefixes
    # what follows are extensions: herd's, vLLM's and others'
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None  # these four are vLLM's older names
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(min_length=1)] | None = None
    guided_grammar: str | None = None
    json_schema: dict[str, Any] | str | None = None  # these two are llama.cpp's
    grammar: str | None = None
    timings: bool | None = None  # tell what the prompt and the replies took, as llama.cpp does

    formats: ClassVar[tuple[str, ...]] = (
        "structured_outputs",
        "guided_json",
        "guided_regex",
        "guided_choice",
        "guided_grammar",
        "json_schema",
        "grammar",
    )

    @model_validator(mode="after")
    def _has_one_format(self) -> Self:
        given = [name for name in self.formats if getattr(self, name) not in (None, _ANY_TEXT)]
        if len(given) > 1:
            raise problem(f"is given, and {given[0]} too", "a reply has one format: give one of them", field=given[1])
        return self


class Length(Wire):
    """Which model, and how much of it."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None


class Sampled(Drawing, Length):
    """What chat completions and completions have in common: how replies are drawn, how many, and how they are sent."""

    stream_options: StreamOptions | None = None

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {  # vLLM's and llama.cpp's, whose clients often send the defaults
        "allowed_token_ids": (),
        "bad_words": ([],),
        "cache_prompt": (True,),
        "id_slot": (-1,),
        "include_stop_str_in_output": (False,),
        "length_penalty": (1,),
        "logits_processors": (),
        "min_tokens": (0,),
        "prompt_logprobs": (),
        "return_token_ids": (False,),
        "return_tokens_as_token_ids": (False,),
        "skip_special_tokens": (True,),
        "spaces_between_special_tokens": (True,),
        "stop_token_ids": ([],),
        "timings_per_token": (False,),
        "truncate_prompt_tokens": (),
        "use_beam_search": (False,),
    }

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.stream_options and not self.stream:
            raise problem("is given, but stream is not true", "set stream, or leave stream_options out", field="stream_options")
        return self


class ChatBody(Sampled):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None  # the newer name of max_tokens
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Annotated[Choice | None, BeforeValidator(_choice)] = None
    parallel_tool_calls: bool | None = None
    return_progress: bool | None = None  # tell in the stream how far the prompt is read, as llama.cpp does

    formats = ("response_format", *Sampled.formats)
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **Sampled.neutral,
        "add_generation_prompt": (True,),
        "audio": (),
        "chat_template": (),
        "chat_template_kwargs": ({}, {"enable_thinking": False}, {"thinking": False}),  # Llama 4 does not think
        "continue_final_message": (False,),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "modalities": (["text"],),
        "moderation": (),
        "prediction": (),
        "reasoning_effort": ("none",),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "verbosity": (),
        "web_search_options": (),
    }
    ignored = frozenset(
        {"metadata", "prompt_cache_options", "prompt_cache_retention", "safety_identifier", "user"},
    )

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        old, new = self.max_tokens, self.max_completion_tokens
        if old and new and old != new:
            raise problem(f"is {old} and max_completion_tokens is {new}, but they mean the same", "give one of them", field="max_tokens")
        if self.return_progress and not self.stream:
            raise problem("is true, but stream is not", "set stream, or leave return_progress out", field="return_progress")
        if self.top_logprobs and not self.logprobs:
            raise problem("is given, but logprobs is not true", "set logprobs, or leave top_logprobs out", field="top_logprobs")
        return self
