"""Grammars at work: which tokens may come next in a reply that must have a form.

A grammar is compiled once and kept; each reply has a matcher of its own, which reads the tokens that are drawn and says, as a mask over
the vocabulary, which may follow. The mask for the next token is made while the model computes (`Masks`). Stop tokens are in it only where
the reply may end. Where nothing but the end may follow, the reply is finished and the model is not asked for a stop token.

Source: llguidance (https://github.com/guidance-ai/llguidance) does all that is hard.
"""

import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from herd.errors import UsageError
from herd.ops.pick import mask
from herd.text.grammar import refused
from herd.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MOST_COMPILED = 64  # grammars that are kept
MOST_ITEMS = 20_000  # ways to go on that are followed at once; 1,333 optional properties make 5,331, and llguidance by itself allows 2,000


class Grammar:
    """The state of one reply. Not for two threads at once."""

    def __init__(self, matcher: "LLMatcher", num_tokens: int) -> None:
        self._matcher = matcher
        self._bits = torch.zeros(-(-num_tokens // 32), dtype=torch.int32)
        self._is_ready = False
        self._num_tokens = num_tokens
        self._forced: deque[int] = deque()  # the tokens that come next, where there is no choice

    @property
    def is_finished(self) -> bool:
        """Whether nothing may follow but the end."""
        return bool(self._matcher.is_stopped())

    def prepare(self) -> None:
        """Make the mask of the next token, if it is not made."""
        if self._is_ready or self._matcher.is_stopped():
            return
        if not self._forced:
            self._look_up()
        if self._forced:  # a mask of llguidance's own would have this one bit
            self._bits.zero_()
            self._bits.numpy().view("uint32")[self._forced[0] // 32] = 1 << self._forced[0] % 32
        else:
            self._matcher.unsafe_compute_mask_ptr(self._bits.data_ptr(), self._bits.nbytes)
        self._is_ready = True

    def mask(self, logits: Tensor) -> None:
        """Set the logits [V] of tokens that may not come next to -inf. Raises `UsageError` when the grammar has failed."""
        self.prepare()
        self._check()
        mask(logits, self._bits)

    def read(self, token: int) -> None:
        """Go on by a token that was drawn. Raises `UsageError` when the grammar has failed."""
        self._matcher.consume_token(token)
        self._is_ready = False
        if self._forced and self._forced.popleft() != token:
            self._forced.clear()
        self._check()

    def drafts(self, guesses: Sequence[int], most: int) -> list[int]:
        """At most `most` tokens that are likely to come next: what the grammar forces, else those guesses that it allows."""
        if not self._forced and not self._is_ready:
            self._look_up()
        if self._forced:
            return list(islice(self._forced, most))
        return list(guesses[: self._matcher.validate_tokens(list(guesses))]) if guesses else []

    def _look_up(self) -> None:
        """All that is forced, at once: llguidance would go through it for every mask, 0.3 us a character."""
        self._forced = deque(self._matcher.compute_ff_tokens())

    def _check(self) -> None:
        if self._matcher.is_error():
            message = self._matcher.get_error().splitlines()[0]
            if "NoExtensionBias" in message:
                raise UsageError("no token of the vocabulary goes on as the reply's grammar wants", "let the grammar take other characters")
            raise UsageError(f"the reply's grammar has failed: {message:.300}", "make the schema or grammar simpler")


class Grammars:
    """Compiles grammars for one vocabulary. Safe from any thread."""

    def __init__(self, tokenizer: Tokenizer, num_tokens: int, stop_ids: Iterable[int]) -> None:
        """num_tokens: of the model's logits, which may be more than the tokenizer knows."""
        self._tokenizer, self._num_tokens, self._stop_ids = tokenizer, num_tokens, sorted(stop_ids)
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()
        self._vocabulary: LLTokenizer | None = None

    def compile(self, text: str, param: str) -> Grammar:
        """A fresh grammar. Raises `UsageError` for one that llguidance does not take, with the keyword at fault and `param`."""
        from llguidance import LLMatcher, LLParserLimits

        with self._lock:
            matcher = self._compiled.get(text)
            if matcher is not None:
                self._compiled.move_to_end(text)
            elif self._vocabulary is None:
                self._vocabulary = _vocabulary(self._tokenizer, self._num_tokens, self._stop_ids)
            vocabulary = self._vocabulary
        if matcher is None:
            assert vocabulary is not None
            limits = LLParserLimits(max_items_in_row=MOST_ITEMS)
            matcher = LLMatcher(vocabulary, text, log_level=0, limits=limits)  # lets other threads run
            if matcher.is_error():
                raise refused(matcher.get_error(), param)
            with self._lock:
                self._compiled[text] = matcher
                if len(self._compiled) > MOST_COMPILED:
                    self._compiled.popitem(last=False)
        return Grammar(matcher.deep_copy(), self._num_tokens)


class Masks:
    """Makes masks in a thread of its own, while the model computes."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None

    def start(self, grammars: list[Grammar]) -> "Future[None] | None":
        """Begin with the masks of a step; wait for the result before anything else is asked of the grammars."""
        if not grammars:
            return None
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="herd-masks")
        return self._pool.submit(_prepare, grammars)


def _prepare(grammars: list[Grammar]) -> None:
    for grammar in grammars:
        grammar.prepare()


class _Words:
    """A vocabulary as llguidance wants it."""

    def __init__(self, tokenizer: Tokenizer, num_tokens: int, stop_id: int) -> None:
        names = {token: name.encode() for name, token in tokenizer.specials.items()}
        self.eos_token_id, self.bos_token_id = stop_id, None
        self.tokens = [names.get(i) or tokenizer.token_bytes(i) for i in range(num_tokens)]
        self.special_token_ids = sorted(token for token in names if token < num_tokens)
        self._encode = tokenizer.encode

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text if isinstance(text, str) else text.decode("utf-8", errors="replace"))


def _vocabulary(tokenizer: Tokenizer, num_tokens: int, stop_ids: list[int]) -> "LLTokenizer":
    """About a second for 200,000 tokens."""
    from llguidance import LLTokenizer
    from llguidance._tokenizer import TokenizerWrapper

    ends = stop_ids or [max(tokenizer.specials.values(), default=num_tokens - 1)]
    words: Any = _Words(tokenizer, num_tokens, ends[0])
    return LLTokenizer(TokenizerWrapper(words), n_vocab=num_tokens, eos_token=ends)
