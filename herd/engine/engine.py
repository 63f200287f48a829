"""The engine: requests in, events out, one step at a time. Synchronous, and owned by one thread."""

import time
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from herd.chat import ChatEvent, Sampling
from herd.engine.config import EngineConfig
from herd.engine.disk import DiskStore
from herd.engine.inputs import build_inputs
from herd.engine.lookup import Lookup
from herd.engine.pages import Pages
from herd.engine.prefix import Chain, Placed
from herd.engine.runner import Runner
from herd.engine.sampler import Sampler
from herd.engine.scheduler import Piece, Scheduler
from herd.engine.sequence import Emit, Sequence
from herd.engine.shelf import Shelf
from herd.engine.stats import PoolStats, Stats, Watch
from herd.errors import ContextError, HerdError, PromptError, UsageError
from herd.model.llama4 import Llama4
from herd.model.swap import activation_bits
from herd.ops.native import default_threads, kernels
from herd.text.prompt import Prompt
from herd.text.stream import Detokenizer
from herd.text.tokenizer import Tokenizer


class Engine:
    """Continuous batching over one model."""

    def __init__(
        self,
        model: Llama4,
        tokenizer: Tokenizer,
        config: EngineConfig,
        store: DiskStore | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """store: where finished chunks go and come from.  clock: seconds, from anywhere."""
        weight = model.norm.weight
        self.model, self.tokenizer, self.config = model.config, tokenizer, config
        self.pages = Pages(self.model, config, dtype=weight.dtype, device=weight.device)
        self.shelf = Shelf(self.pages, store, self.model.global_layers) if store is not None else None
        self.scheduler = Scheduler(config, self.pages, self.shelf)
        self.runner = Runner(model, self.pages)
        if self.pages.file is not None and self.runner.whole is None:
            raise UsageError(
                "kv_folder is set, and this model runs layer by layer, which would read a whole context into memory",
                "the native kernels read it from the file: they take int4 or int8 models in float32 (herd quantize)",
                param="kv_folder",
            )
        self.watch = Watch(clock)
        self.threads = config.threads or default_threads()
        self.activation_bits = activation_bits(model)
        native = kernels()
        if native is not None:
            native.use_threads(self.threads)  # one pool serves all engines of a process; the last to be made decides

    @property
    def context_tokens(self) -> int:
        """The longest sequence, prompt and reply together."""
        return self.pages.capacity.context_tokens

    def sequence(self, prompt: Prompt, sampling: Sampling, emit: Emit, salt: bytes = b"") -> Sequence:
        """Make a sequence that is sure to fit. Raises `ContextError` or `PromptError` with the numbers. Safe from any thread.

        salt: only sequences with the same one share what they have computed.
        """
        length, room = len(prompt.tokens), self.context_tokens
        if not length:
            raise PromptError("the prompt is empty", "give at least one token")
        largest, smallest = max(prompt.tokens), min(prompt.tokens)
        if largest >= self.model.vocab_size or smallest < 0:
            wrong = largest if largest >= self.model.vocab_size else smallest
            raise PromptError(f"token {wrong} is not in the vocabulary of {self.model.vocab_size:,}")
        if length >= room:
            raise ContextError(
                f"prompt has {length:,} tokens; this engine holds {room:,}, reply included",
                "shorten it, or raise --context-tokens where the model allows",
                param="messages",
            )
        wanted = sampling.max_tokens
        if wanted is not None and length + wanted > room:
            raise ContextError(
                f"prompt has {length:,} tokens and max_tokens is {wanted:,}; this engine holds {room:,} in all",
                f"lower max_tokens to {room - length:,} or less",
                param="max_tokens",
            )
        patches = [i for i, token in enumerate(prompt.tokens) if token == self.model.patch_id]
        if prompt.images and self.model.vision is None:
            raise PromptError("this model reads no images", "send text alone, or choose a model with vision")
        tokens_per_tile = self.model.vision.tokens_per_tile if self.model.vision else 0
        ends = list(accumulate((len(tiles.pixels) * tokens_per_tile for tiles in prompt.images), initial=0))
        num_features = ends[-1]
        if len(patches) != num_features:
            raise PromptError(f"the prompt has {len(patches)} patch tokens and its images give {num_features} features")
        spans = zip(pairwise(ends), prompt.images, strict=True)
        images = [Placed(patches[first], patches[end - 1], tiles) for (first, end), tiles in spans]
        return Sequence(
            prompt=prompt,
            sampler=Sampler(self.advised(sampling)),
            detokenizer=Detokenizer(self.tokenizer, sampling.stop),
            stop_ids=frozenset() if sampling.ignore_eos else frozenset(self.model.stop_ids),
            max_reply=wanted or room - length,
            patches=patches,
            lookup=Lookup(self.config.draft_tokens),
            chain=Chain(page_tokens=self.config.page_tokens, salt=salt, images=images),
            emit=emit,
        )

    def advised(self, sampling: Sampling) -> Sampling:
        """`sampling` with the makers' advice where the caller has no wish."""
        temperature = self.model.advised_temperature if sampling.temperature is None else sampling.temperature
        top_p = self.model.advised_top_p if sampling.top_p is None else sampling.top_p
        return replace(sampling, temperature=temperature, top_p=top_p)

    @torch.inference_mode()
    def step(self) -> list[tuple[Sequence, ChatEvent | HerdError]]:
        """Compute one batch; the events that it gave, for whom. An error ends its own sequence and no other."""
        self.watch.start()
        plan = self.scheduler.next()
        self.watch.lap("plan")
        self.runner.see(plan)
        self.watch.lap("see")
        logits = self.runner(build_inputs(plan, self.pages, self.model))
        seconds = self.watch.lap("run")
        rows = torch.split(logits, [piece.num_rows for piece in plan.due])
        tokens = [_drawn(piece, each) for piece, each in zip(plan.due, rows, strict=True)]
        self.scheduler.learn(plan, seconds + self.watch.lap("sample"))
        events = self.scheduler.accept(plan, tokens)
        self.watch.lap("accept")
        return events

    def stats(self) -> Stats:
        """What it holds now and has done so far. Numbers may be a step apart when asked from another thread."""
        scheduler = self.scheduler
        return Stats(
            num_waiting=len(scheduler.waiting),
            num_running=len(scheduler.running),
            full_pages=PoolStats.of(self.pages.full),
            local_pages=PoolStats.of(self.pages.local),
            hit_tokens=scheduler.num_hits,
            restored_tokens=self.shelf.num_restored if self.shelf else 0,
            disk=self.shelf.store.stats() if self.shelf else None,
            drafted_tokens=scheduler.num_drafted,
            accepted_tokens=scheduler.num_accepted,
            num_steps=self.watch.num_steps,
            seconds=dict(self.watch.seconds),
        )


def _drawn(piece: Piece, logits: Tensor) -> list[int] | HerdError:
    """What a piece's sequence draws from its logits [rows, V], or why it cannot: they are no numbers."""
    try:
        return piece.sequence.sampler.draw(logits, piece.drafts)
    except HerdError as error:
        return error
