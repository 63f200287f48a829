"""The contract of a conversation: what goes into any model and what comes out. The waist of the hourglass.

Everything above (server, command line, apps) makes a `ChatRequest` and reads `ChatEvent`s; everything below (the local engine, any
provider) is a `Backend`, which lists its models and has that one call. A reply is a stream; a whole reply is the stream, folded.
"""

import re
from collections.abc import AsyncGenerator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from herd.errors import UsageError, nearest

Role = Literal["system", "user", "assistant", "tool"]
FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Image:
    """An image as the user sent it: encoded bytes (PNG, JPEG, WebP, GIF, ...), not yet opened or checked."""

    data: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Tool:
    """A function that the model may call. Raises `UsageError` for a name that no client of OpenAI's API may use."""

    name: str  # 1 to 64 of A-Z a-z 0-9 _ -
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)  # JSON schema of the arguments, an object; empty: none are declared
    strict: bool = False  # a schema that cannot be enforced is an error; else what can be enforced of it is

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", self.name):
            raise UsageError(f"a tool is called {self.name!r:.100}", "a name has 1 to 64 of the characters A-Z a-z 0-9 _ -", param="tools")
        if not isinstance(self.parameters, Mapping):
            raise UsageError(f"the parameters of tool {self.name!r} are no JSON schema", "give a schema of type object", param="tools")


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolCall:
    """A call that the model asks for."""

    id: str
    name: str
    arguments: str  # a JSON object, as text; a call that was cut off by the token limit has the beginning of one


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolChoice:
    """Which tools a reply may or must call."""

    mode: Literal["auto", "none", "required"] = "auto"  # the model decides; no call; at least one
    names: tuple[str, ...] = ()  # only these; empty: any tool
    parallel: bool = True  # several calls in one reply


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn. `content` is text and images in the order in which they were written; a reply's calls come after its text."""

    role: Role  # tool: what a call gave
    content: tuple[str | Image, ...]
    tool_calls: tuple[ToolCall, ...] = ()  # of the assistant
    tool_call_id: str | None = None  # of a tool's result: the call that it answers; None: the next one

    @property
    def text(self) -> str:
        """The text parts, joined."""
        return "".join(part for part in self.content if isinstance(part, str))


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """What the text of a reply must be; tokens that would break it are never drawn."""

    kind: Literal["json_object", "json_schema", "regex", "choice", "lark", "gbnf"]
    value: Any = None  # the schema (a dict or a bool), the pattern, a tuple of texts, the grammar's text; none for json_object
    strict: bool = True  # what of a schema cannot be enforced is an error; else it is left out

    def __post_init__(self) -> None:
        wanted = _FORMATS.get(self.kind)
        if wanted is None:
            raise UsageError(f"there is no format {self.kind!r}", nearest(self.kind, _FORMATS), param="response_format")
        is_right = isinstance(self.value, wanted)
        if self.kind == "choice":
            is_right = isinstance(self.value, tuple) and bool(self.value) and all(isinstance(text, str) for text in self.value)
        if not is_right:
            names = " or ".join(kind.__name__ for kind in wanted)
            message = f"the value of format {self.kind} is {self.value!r:.60}"
            raise UsageError(message, f"it must be of type {names}, and not empty", param="response_format")


_FORMATS: dict[str, tuple[type, ...]] = {
    "json_object": (type(None),),
    "json_schema": (Mapping, bool),
    "regex": (str,),
    "choice": (tuple,),
    "lark": (str,),
    "gbnf": (str,),
}
MOST_TOP_LOGPROBS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is drawn and when a reply ends.

    Steps run in this order: penalties, logit_bias, format, temperature, top_k, top_p, min_p. Log-probabilities are the model's own, before
    all of these.
    """

    temperature: float | None = None  # 0 is greedy; None: what the model's makers advise
    top_k: int = 0  # keep the k likeliest tokens; 0 keeps all
    top_p: float | None = None  # keep the smallest set of tokens with this much probability, 1 keeps all; None: as advised
    min_p: float = 0.0  # drop tokens less likely than this share of the likeliest
    seed: int | None = None  # None draws a new seed for each request
    max_tokens: int | None = None  # None: the rest of the context
    stop: tuple[str, ...] = ()  # the reply ends before the first of these strings
    ignore_eos: bool = False  # do not stop at the model's own stop tokens (for measuring)
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token -> added to its logit, -100 to 100
    presence_penalty: float = 0.0  # taken from the logit of every token that the reply has already
    frequency_penalty: float = 0.0  # taken as often as the reply has the token
    repetition_penalty: float = 1.0  # divides positive logits and multiplies negative ones of tokens in prompt and reply; 1 is none
    logprobs: int | None = None  # tell the log-probability of each token and of so many of the likeliest; None: tell none
    format: Format | None = None  # what the reply must be

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0, 2, may_be_none=True)
        _check("top_p", self.top_p, 0, 1, may_be_none=True)
        _check("top_k", self.top_k, 0, 1 << 20, whole=True)
        _check("min_p", self.min_p, 0, 1)
        _check("seed", self.seed, -(1 << 63), (1 << 63) - 1, whole=True, may_be_none=True)
        _check("max_tokens", self.max_tokens, 1, 1 << 40, whole=True, may_be_none=True)
        _check("presence_penalty", self.presence_penalty, -2, 2)
        _check("frequency_penalty", self.frequency_penalty, -2, 2)
        _check("repetition_penalty", self.repetition_penalty, 0.01, 100)
        _check("logprobs", self.logprobs, 0, MOST_TOP_LOGPROBS, whole=True, may_be_none=True)
        if not isinstance(self.logit_bias, Mapping):
            raise UsageError(f"logit_bias is {self.logit_bias!r:.60}", "give a dict from token ids to numbers", param="logit_bias")
        for token, bias in self.logit_bias.items():
            _check("logit_bias", token, 0, 1 << 30, whole=True)
            _check("logit_bias", bias, -100, 100)
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
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = field(default_factory=ToolChoice)
    background: bool = False  # nobody waits for it: it may take what time and room other requests leave
    progress: bool = False  # tell how far the prompt has been read

    def __post_init__(self) -> None:
        known = [tool.name for tool in self.tools]
        if len(set(known)) < len(known):
            raise UsageError(f"two tools have the same name: {', '.join(known)}", "give each its own", param="tools")
        for name in self.tool_choice.names:
            if name not in known:
                hint = nearest(name, known) or "list it in tools"
                raise UsageError(f"tool_choice names {name!r}, which is none of the tools", hint, param="tool_choice")
        if self.tool_choice.mode == "required" and not known:
            raise UsageError("tool_choice requires a call, and there are no tools", "list some in tools", param="tool_choice")


@dataclass(frozen=True, kw_only=True, slots=True)
class TextRequest:
    """One request to continue a text, without a conversation around it."""

    model: str  # a name that the backend serves
    prompt: str | tuple[int, ...]  # a text, or tokens, which are taken as they are
    begin: bool = True  # put a begin-of-text token before a text, where the model has one
    sampling: Sampling = field(default_factory=Sampling)
    cache_salt: tuple[str, ...] = ()  # as of a `ChatRequest`
    background: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Embedding:
    """A text as a vector."""

    vector: tuple[float, ...]  # of length 1
    num_tokens: int  # of the text


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokenized:
    """A prompt as the model reads it."""

    tokens: tuple[int, ...]
    pieces: tuple[bytes, ...]  # what each stands for, maybe a part of a character; of a special token its name
    context_tokens: int  # room, prompt and reply together


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What a reply cost, in tokens."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0  # of the prompt, those that had been computed before, for this request or another
    image_tokens: int = 0  # of the prompt, those that images became


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """The next piece of the reply: whole characters, never empty."""

    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolCallStart:
    """A call begins; its arguments follow."""

    index: int  # of the reply's calls, from 0
    id: str
    name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolCallDelta:
    """The next piece of a call's arguments, never empty. The pieces add up to the text of a JSON object."""

    index: int
    arguments: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolCallEnd:
    """A call is whole. One that was cut off has no end."""

    index: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TopToken:
    """A token that could have been drawn."""

    token: int
    data: bytes  # what it stands for, maybe a part of a character
    logprob: float  # natural logarithm of the model's own probability


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """A token of the reply and its log-probability, where they were asked for; it comes before the text that it leads to.

    The stop token has none.
    """

    token: int
    data: bytes
    logprob: float
    top: tuple[TopToken, ...] = ()  # the likeliest, the likeliest first


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far the prompt has been read, where that was asked for: after each piece of it but the last, before all else of the reply."""

    prompt_tokens: int
    read_tokens: int  # those that were taken over included
    cached_tokens: int  # those


@dataclass(frozen=True, kw_only=True, slots=True)
class Done:
    """The end of the reply; always the last event. A failure is raised as a `HerdError` by the iterator instead."""

    reason: FinishReason
    usage: Usage
    stop: str | None = None  # the stop string that ended it, where one did
    tokens: tuple[int, ...] = ()  # the reply's ids, its stop token included; empty where a provider does not tell


ChatEvent = Text | ToolCallStart | ToolCallDelta | ToolCallEnd | Drawn | Progress | Done


class Fold:
    """A whole reply, from its events."""

    def __init__(self, events: Iterable[ChatEvent] = ()) -> None:
        self.done: Done | None = None
        self.drawn: list[Drawn] = []
        self._text: list[str] = []
        self._calls: list[tuple[ToolCallStart, list[str]]] = []
        for event in events:
            self.add(event)

    def add(self, event: ChatEvent) -> None:
        match event:
            case Text():
                self._text.append(event.text)
            case ToolCallStart():
                self._calls.append((event, []))
            case ToolCallDelta():
                self._calls[event.index][1].append(event.arguments)
            case Drawn():
                self.drawn.append(event)
            case Done():
                self.done = event

    @property
    def message(self) -> Message:
        """The reply as the conversation's next message."""
        text = "".join(self._text)
        calls = tuple(ToolCall(id=start.id, name=start.name, arguments="".join(pieces)) for start, pieces in self._calls)
        return Message(role="assistant", content=(text,) if text else (), tool_calls=calls)


class Backend(Protocol):
    """Anything that answers: the local engine, or a provider."""

    def models(self) -> list[str]:
        """Names that `ChatRequest.model` may hold."""
        ...

    def chat(self, request: ChatRequest) -> AsyncGenerator[ChatEvent, None]:
        """Stream one reply. Closing the generator cancels the request and frees what it held. Raises `HerdError`."""
        ...


@runtime_checkable
class TextBackend(Backend, Protocol):
    """A backend that continues texts too, and shows its tokens. Raises as `Backend` does."""

    def complete(self, request: TextRequest) -> AsyncGenerator[ChatEvent, None]:
        """Stream one continuation, as `chat` streams a reply."""
        ...

    async def tokenize(self, request: ChatRequest | TextRequest) -> Tokenized:
        """The request's prompt."""
        ...

    async def detokenize(self, model: str, tokens: tuple[int, ...]) -> str:
        """The text of tokens, special ones by name."""
        ...

    def context_tokens(self, model: str) -> int | None:
        """Room for a prompt and its reply together; None while it is not known."""
        ...


@runtime_checkable
class EmbeddingBackend(Backend, Protocol):
    """A backend that turns texts into vectors too."""

    async def embed(self, request: TextRequest) -> Embedding:
        """The vector of the request's prompt; `sampling` is of no matter."""
        ...
