"""The contract of a conversation: what goes into any model and what comes out. The waist of the hourglass.

Everything above (server, command line, apps) makes a `ChatRequest` and reads `ChatEvent`s; everything below (the local engine, any
provider) is a `Backend`, which lists its models and has that one call. A reply is a stream; a whole reply is the stream, folded.
"""

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from herd.errors import UsageError

Role = Literal["system", "user", "assistant"]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Image:
    """An image as the user sent it: encoded bytes (PNG, JPEG, WebP, GIF, ...), not yet opened or checked."""

    data: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn. `content` is text and images in the order in which they were written."""

    role: Role
    content: tuple[str | Image, ...]

    @property
    def text(self) -> str:
        """The text parts, joined."""
        return "".join(part for part in self.content if isinstance(part, str))


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is drawn and when a reply ends. Steps run in this order: temperature, top_k, top_p, min_p."""

    temperature: float | None = None  # 0 is greedy; None: what the model's makers advise
    top_k: int = 0  # keep the k likeliest tokens; 0 keeps all
    top_p: float | None = None  # keep the smallest set of tokens with this much probability, 1 keeps all; None: as advised
    min_p: float = 0.0  # drop tokens less likely than this share of the likeliest
    seed: int | None = None  # None draws a new seed for each request
    max_tokens: int | None = None  # None: the rest of the context
    stop: tuple[str, ...] = ()  # the reply ends before the first of these strings
    ignore_eos: bool = False  # do not stop at the model's own stop tokens (for measuring)

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0, 2, may_be_none=True)
        _check("top_p", self.top_p, 0, 1, may_be_none=True)
        _check("top_k", self.top_k, 0, 1 << 20, whole=True)
        _check("min_p", self.min_p, 0, 1)
        _check("seed", self.seed, -(1 << 63), (1 << 63) - 1, whole=True, may_be_none=True)
        _check("max_tokens", self.max_tokens, 1, 1 << 40, whole=True, may_be_none=True)
        if not isinstance(self.stop, tuple) or not all(isinstance(s, str) and s for s in self.stop):
            raise UsageError(
                f"stop is {self.stop!r}; it must be a tuple of texts, none empty", "give the texts at which to stop", param="stop"
            )


def _check(name: str, value: Any, low: float, high: float, *, whole: bool = False, may_be_none: bool = False) -> None:
    if value is None and may_be_none:
        return
    is_number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:
        what = "a whole number" if whole else "a number"
        raise UsageError(f"{name} is {value!r}; it must be {what} between {low} and {high}", f"give a {name} in that range", param=name)


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatRequest:
    """One request for one reply."""

    model: str  # a name that the backend serves
    messages: tuple[Message, ...]
    sampling: Sampling = field(default_factory=Sampling)
    cache_salt: tuple[str, ...] = ()  # only requests with the same words share what was computed of their prompts


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What a reply cost, in tokens."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0  # of the prompt, those that had been computed before, for this request or another


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """The next piece of the reply: whole characters, never empty."""

    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Done:
    """The end of the reply; always the last event. A failure is raised as a `HerdError` by the iterator instead."""

    reason: FinishReason
    usage: Usage
    tokens: tuple[int, ...] = ()  # the reply's ids, its stop token included; empty where a provider does not tell


ChatEvent = Text | Done


class Backend(Protocol):
    """Anything that answers: the local engine, or a provider."""

    def models(self) -> list[str]:
        """Names that `ChatRequest.model` may hold."""
        ...

    def chat(self, request: ChatRequest) -> AsyncGenerator[ChatEvent, None]:
        """Stream one reply. Closing the generator cancels the request and frees what it held. Raises `HerdError`."""
        ...
