"""The wire form of OpenAI's chat completions. It takes what herd honours and refuses the rest by name.

Every field of a request that OpenAI documents is in exactly one of three groups, and an unknown one is an error that names the nearest:

* honoured: the fields of these classes;
* neutral: known, but herd cannot do it, so that only a value which asks for nothing is taken, and null always is;
* ignored: without effect on the reply by OpenAI's own contract (bookkeeping, billing, caching), or, for `name` and `detail`, because
  Llama 4's prompt format has no place for it.

An absent field and null mean the same: the default of `herd.chat.Sampling`, which for temperature and top_p is what the makers advise.
What values may be is checked where they are used, in `Sampling`; here are only the limits of the wire form itself.

Source: `openai.types.chat.completion_create_params` of openai 3.54.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from herd.errors import UsageError, nearest


def _problem(problem: str, hint: str, *, field: str = "", code: str = "") -> PydanticCustomError:
    """An error in herd's own words about the value at hand, or about one field of it."""
    return PydanticCustomError("herd", "{problem}", {"problem": problem, "hint": hint, "field": field, "code": code})


class Wire(BaseModel):
    """A JSON object from outside."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}  # field: the values that ask for nothing, beside null
    ignored: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _sort_fields(cls, data: Any) -> Any:
        """Refuse what is unknown or not neutral; pass on what is honoured."""
        if not isinstance(data, dict):
            return data
        for name, value in data.items():
            if name in cls.neutral:
                if value is not None and value not in cls.neutral[name]:
                    allowed = " or ".join([_shown(v) for v in cls.neutral[name]] or ["null"])
                    problem = f"is {_shown(value)}, which herd does not support; it takes only {allowed}"
                    raise _problem(problem, f"leave {name} out", field=name, code="unsupported_parameter")
            elif name not in cls.model_fields and name not in cls.ignored:
                known = [*cls.model_fields, *cls.neutral, *cls.ignored]
                hint = nearest(name, known) or f"there are: {', '.join(cls.model_fields)}"
                raise _problem("is an unknown field", hint, field=name, code="unknown_parameter")
        return {name: value for name, value in data.items() if name in cls.model_fields}


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
        for field in ("text", "image_url"):
            if (getattr(self, field) is None) is (self.type == field):
                problem = "is missing" if self.type == field else f"stands in a part of type {self.type!r}"
                raise _problem(problem, f"a part of type {self.type!r} holds {self.type} alone", field=field)
        return self


def _parts(content: Any) -> Any:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if isinstance(content, list):
        return content
    raise _problem(f"is {_shown(content)}; it must be a string or a list of parts", "give the text of the message")


class ChatMessage(Wire):
    """One turn. The neutral fields are those of OpenAI's own replies, which clients send back as they came."""

    role: Literal["developer", "system", "user", "assistant"]  # developer is OpenAI's newer word for system
    content: Annotated[list[Part], BeforeValidator(_parts), Field(min_length=1)]

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "annotations": ([],),
        "audio": (),
        "function_call": (),
        "refusal": (),
        "tool_calls": ([],),
    }
    ignored = frozenset({"name"})


class StreamOptions(Wire):
    include_usage: bool | None = None

    ignored = frozenset({"include_obfuscation"})  # padding against eavesdroppers who count bytes


def _strings(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


class ChatBody(Wire):
    """The body of POST /v1/chat/completions."""

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None  # the older name of the same
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: Annotated[Annotated[list[str], Field(max_length=4)] | None, BeforeValidator(_strings)] = None
    prompt_cache_key: str | None = None  # OpenAI routes by it; here, only requests with the same key share computed prefixes
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    top_k: int | None = None  # this and the two below are herd's, vLLM's and others' extensions
    min_p: float | None = None
    ignore_eos: bool | None = None

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "audio": (),
        "frequency_penalty": (0,),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "logit_bias": ({},),
        "logprobs": (False,),
        "modalities": (["text"],),
        "moderation": (),
        "n": (1,),
        "parallel_tool_calls": (True, False),  # without tools there are no calls
        "prediction": (),
        "presence_penalty": (0,),
        "reasoning_effort": ("none",),
        "response_format": ({"type": "text"},),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "top_logprobs": (0,),
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
            raise _problem(f"is {old} and max_completion_tokens is {new}, but they mean the same", "give one of them", field="max_tokens")
        if self.stream_options and not self.stream:
            raise _problem("is given, but stream is not true", "set stream, or leave stream_options out", field="stream_options")
        return self


def usage_error(error: ValidationError) -> UsageError:
    """The first thing that pydantic found wrong, as an error that names the field, the value and the limit."""
    first = error.errors(include_url=False)[0]
    context = first.get("ctx", {})
    param = ".".join(str(step) for step in (*first["loc"], context.get("field")) if step not in (None, ""))
    name = param or "the body"
    match first["type"]:
        case "herd":
            found = UsageError(f"{name} {context['problem']}", context["hint"], param=param)
            found.code = context["code"] or None
            return found
        case "json_invalid":
            return UsageError(f"the body is not JSON: {context['error']}", "send one JSON object")
        case "missing":
            return UsageError(f"{name} is missing", f"give {name}", param=param)
        case "model_type":
            return UsageError(f"{name} is {_shown(first['input'])}; it must be a JSON object", param=param or None)
    limit = first["msg"].replace("Input should", "it should").replace("List should", "the list should")
    return UsageError(f"{name} is {_shown(first['input'])}; {limit}", param=param)


def _shown(value: Any) -> str:
    """A value as the client wrote it, cut to a line."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
