"""One reply in the making: its tokens, what of them is computed, its pages, and how it reads as text."""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from herd.chat import ChatEvent, Done, FinishReason, Text, Usage
from herd.engine.lookup import Lookup
from herd.engine.prefix import Chain
from herd.engine.sampler import Sampler
from herd.errors import HerdError
from herd.text.prompt import Prompt
from herd.text.stream import Detokenizer

Emit = Callable[[ChatEvent | HerdError], None]


@dataclass(eq=False, kw_only=True, slots=True)
class Sequence:
    """A prompt and the reply to it, owned by the engine's thread once submitted."""

    prompt: Prompt
    sampler: Sampler
    detokenizer: Detokenizer
    stop_ids: frozenset[int]
    max_reply: int  # tokens the reply may have
    patches: list[int]  # positions of `<|patch|>` in the prompt, ascending
    chain: Chain  # what its pages hold, as keys
    lookup: Lookup  # guesses at what the reply goes on with
    emit: Emit  # receives events; an error is the last one
    flush: Callable[[], None] | None = None  # called when a step has emitted all its events, once for all sequences that have the same
    tokens: list[int] = field(init=False)  # prompt and reply
    num_computed: int = 0  # tokens whose keys and values are in pages
    num_reached: int = 0  # the most that ever were: making room for others can take pages away again
    num_cached: int = 0  # tokens of the prompt that were taken over from others and not computed
    full_table: list[int] = field(default_factory=list)  # pages for global layers, from position 0
    local_table: list[int] = field(default_factory=list)  # pages for local layers, from the start of the current chunk
    features: Tensor | None = None  # [patches, D], those of an image made when the first of them is computed
    encoded: set[int] = field(default_factory=set)  # first positions of the images whose features are made
    finish: FinishReason | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt.tokens)

    @property
    def num_prompt(self) -> int:
        return len(self.prompt.tokens)

    @property
    def reply_left(self) -> int:
        """Tokens that the reply may still get."""
        return self.num_prompt + self.max_reply - len(self.tokens)

    @property
    def num_waiting(self) -> int:
        """Tokens not yet computed: 1 while decoding."""
        return len(self.tokens) - self.num_computed

    def patches_between(self, start: int, stop: int) -> slice:
        """Which rows of `features` belong to positions [start, stop)."""
        return slice(bisect_left(self.patches, start), bisect_left(self.patches, stop))

    def accept(self, token: int) -> list[ChatEvent]:
        """Append the token that was drawn, and say what the reader gets to see of it."""
        self.tokens.append(token)
        if token in self.stop_ids:
            text, self.finish = self.detokenizer.finish(), "stop"
        else:
            text = self.detokenizer.push(token)
            if self.detokenizer.stopped:
                self.finish = "stop"
            elif not self.reply_left:
                text, self.finish = text + self.detokenizer.finish(), "length"
        events: list[ChatEvent] = [Text(text=text)] if text else []
        if self.finish:
            reply = tuple(self.tokens[self.num_prompt :])
            usage = Usage(prompt_tokens=self.num_prompt, completion_tokens=len(reply), cached_tokens=self.num_cached)
            events.append(Done(reason=self.finish, usage=usage, tokens=reply))
        return events
