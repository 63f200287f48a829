"""One reply in the making: its tokens, what of them is computed, its pages, and how it reads as text."""

from array import array
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from herd.chat import ChatEvent, Done, Drawn, FinishReason, Progress, Text, TopToken, Usage
from herd.engine.lookup import Lookup
from herd.engine.mean import Mean
from herd.engine.payoff import Payoff
from herd.engine.prefix import Chain
from herd.engine.sampler import Sampler
from herd.errors import HerdError
from herd.text.calls import CallReader
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
    reader: CallReader | None = None  # finds calls of tools in the text; None where there are no tools
    tells_progress: bool = False  # how far its prompt is read
    background: bool = False  # computed after all others, in the time and room that they leave
    mean: Mean | None = None  # where a vector of the prompt is wanted, and no reply
    flush: Callable[[], None] | None = None  # called when a step has emitted all its events, once for all sequences that have the same
    tokens: list[int] = field(init=False)  # prompt and reply
    num_computed: int = 0  # tokens whose keys and values are in pages
    num_reached: int = 0  # the most that ever were: making room for others can take pages away again
    num_cached: int = 0  # tokens of the prompt that were taken over from others and not computed
    full_table: "array[int]" = field(default_factory=partial(array, "q"))  # pages for global layers, from position 0
    local_table: "array[int]" = field(default_factory=partial(array, "q"))  # for local layers, from the start of the current chunk
    features: Tensor | None = None  # [patches, D], those of an image made when the first of them is computed
    encoded: set[int] = field(default_factory=set)  # first positions of the images whose features are made
    finish: FinishReason | None = None
    arrived: float = 0.0  # when it was made, by the engine's clock
    row: Any = None  # its `trace.Row`, where a trace is written

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt.tokens)

    @property
    def num_prompt(self) -> int:
        return len(self.prompt.tokens)

    @property
    def shares(self) -> bool:
        """Whether it takes over what others have computed, and they what it has: a mean needs every token's state anew."""
        return self.mean is None

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

    def drafts(self, most: int, payoff: Payoff, others: int) -> tuple[list[int], int]:
        """At most `most` tokens that the model may find right next, and how many of them are guesses of `lookup`.

        others: how many more sequences decode in the same step.
        """
        grammar, most = self.sampler.grammar, min(most, self.lookup.most)
        guesses = self.lookup.drafts(self.tokens, most, payoff, others)
        if grammar is None:
            return guesses, len(guesses)
        drafts = grammar.drafts(guesses, most) if most > 0 else []
        return drafts, len(drafts) if drafts == guesses[: len(drafts)] else 0

    def progress(self) -> Progress:
        """How far the prompt is read."""
        return Progress(prompt_tokens=self.num_prompt, read_tokens=min(self.num_computed, self.num_prompt), cached_tokens=self.num_cached)

    def accept(self, tokens: list[int]) -> list[ChatEvent]:
        """Append the tokens that were drawn until one ends the reply, and say what the reader gets to see of them."""
        events: list[ChatEvent] = []
        for place, token in enumerate(tokens, start=1):
            events += self._accept(token, is_last=place == len(tokens) and self.sampler.is_finished)
            if self.finish:
                break
        return events

    def read(self) -> Done:
        """The end of a sequence that gets no reply."""
        self.finish = "stop"
        return Done(reason="stop", usage=self._usage(0))

    def _usage(self, num_reply: int) -> Usage:
        cached, images = self.num_cached, self.prompt.num_image_tokens
        return Usage(prompt_tokens=self.num_prompt, completion_tokens=num_reply, cached_tokens=cached, image_tokens=images)

    def _accept(self, token: int, *, is_last: bool) -> list[ChatEvent]:
        """is_last: nothing can follow it."""
        self.tokens.append(token)
        events: list[ChatEvent] = []
        is_stop = token in self.stop_ids
        if self.sampler.told:
            told = self._drawn(token)
            events += [] if is_stop else [told]
        text = "" if is_stop else self.detokenizer.push(token)
        if is_stop or is_last or self.detokenizer.stopped:
            self.finish = "stop"
        elif not self.reply_left:
            self.finish = "length"
        if self.finish:
            text += self.detokenizer.finish()
        events += self._read(text)
        if self.finish:
            reply = tuple(self.tokens[self.num_prompt :])
            stop = self.detokenizer.stop if self.finish == "stop" else None
            events.append(Done(reason=self.finish, usage=self._usage(len(reply)), stop=stop, tokens=reply))
        return events

    def _read(self, text: str) -> list[ChatEvent]:
        """The events of the reply's next text."""
        reader = self.reader
        if reader is None:
            return [Text(text=text)] if text else []
        events = reader.push(text)
        if reader.stopped and not self.finish:
            self.finish = "stop"
        if self.finish:
            events += reader.finish()
        if self.finish == "stop" and reader.num_calls:
            self.finish = "tool_calls"
        return events

    def _drawn(self, token: int) -> Drawn:
        logprob, top = self.sampler.told.popleft()
        data = self.detokenizer.tokenizer.token_bytes
        tops = tuple(TopToken(token=other, data=data(other), logprob=value) for other, value in top)
        return Drawn(token=token, data=data(token), logprob=logprob, top=tops)
