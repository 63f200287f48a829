"""The engine: requests in, events out, one step at a time. Synchronous, and owned by one thread."""

import time
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from herd.chat import ChatEvent, Sampling, Tool, ToolChoice
from herd.engine.config import EngineConfig
from herd.engine.disk import DiskStore
from herd.engine.grammar import Grammars, Masks
from herd.engine.inputs import build_inputs
from herd.engine.lookup import Lookup
from herd.engine.mean import Mean
from herd.engine.pages import Pages, kept_dtype
from herd.engine.prefix import Chain, Placed
from herd.engine.runner import Runner
from herd.engine.sampler import Sampler
from herd.engine.scheduler import Piece, Scheduler
from herd.engine.sequence import Emit, Sequence
from herd.engine.shelf import Shelf
from herd.engine.stats import PoolStats, Stats, Watch
from herd.engine.trace import Trace
from herd.errors import ContextError, HerdError, PromptError, UsageError
from herd.model.llama4 import Llama4
from herd.model.swap import activation_bits
from herd.ops.native import default_threads, kernels
from herd.text.calls import CallReader
from herd.text.grammar import guarded, reply_grammar
from herd.text.prompt import Prompt, tool_format_of
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
        self.pages = Pages(self.model, config, dtype=kept_dtype(config, model), device=weight.device)
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
        self.trace: Trace | None = None  # where steps are noted, if somebody wants to know
        self.tool_format = tool_format_of(self.model.chat_format, config.tool_format)
        self.grammars = Grammars(tokenizer, self.model.vocab_size, self.model.stop_ids)
        self.masks = Masks()
        self.activation_bits = activation_bits(model)
        native = kernels()
        self.threads = config.threads or default_threads() if native is None else native.share(self, config.threads)

    @property
    def context_tokens(self) -> int:
        """The longest sequence, prompt and reply together."""
        return self.pages.capacity.context_tokens

    def sequence(
        self,
        prompt: Prompt,
        sampling: Sampling,
        emit: Emit,
        salt: bytes = b"",
        tools: tuple[Tool, ...] = (),
        tool_choice: ToolChoice | None = None,
        *,
        background: bool = False,
        progress: bool = False,
        mean: Mean | None = None,
    ) -> Sequence:
        """Make a sequence that is sure to fit. Raises `ContextError` or `PromptError` with the numbers, and `UsageError` for a format or
        tools that cannot be enforced. Safe from any thread.

        salt: only sequences with the same one share what they have computed.  tools: those whose calls are looked for in the reply.
        background: compute it after all others.  progress: tell how far the prompt is read.  mean: takes up the prompt's states, and
        there is no reply.
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
        if wrong_id := next((token for token in sampling.logit_bias if token >= self.model.vocab_size), None):
            raise UsageError(f"logit_bias has token {wrong_id}; the vocabulary has {self.model.vocab_size}", param="logit_bias")
        choice = tool_choice or ToolChoice()
        tools = () if choice.mode == "none" else tuple(tool for tool in tools if not choice.names or tool.name in choice.names)
        grammar = reply_grammar(sampling.format, tools, choice, self.tool_format, self.tokenizer.specials)
        param = "tools" if tools else "response_format"
        reader = None
        if tools:
            names = [tool.name for tool in tools]
            required = choice.mode == "required"
            reader = CallReader(names, parallel=choice.parallel, trusted=guarded(choice, self.tool_format), required=required)
        return Sequence(
            prompt=prompt,
            sampler=Sampler(self.advised(sampling), prompt.tokens, self.grammars.compile(grammar, param) if grammar else None),
            detokenizer=Detokenizer(self.tokenizer, sampling.stop),
            stop_ids=frozenset() if sampling.ignore_eos else frozenset(self.model.stop_ids),
            max_reply=wanted or room - length,
            patches=patches,
            lookup=Lookup(self.config.draft_tokens if mean is None else 0),
            chain=Chain(page_tokens=self.config.page_tokens, salt=salt, images=images),
            emit=emit,
            arrived=self.watch.clock(),
            reader=reader,
            background=background,
            tells_progress=progress,
            mean=mean,
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
        masks = self.masks.start([p.sequence.sampler.grammar for p in plan.due if p.sequence.sampler.grammar is not None])
        self.watch.lap("plan")
        self.runner.see(plan)
        self.watch.lap("see")
        logits = self.runner(build_inputs(plan, self.pages, self.model))
        seconds = self.watch.lap("run")
        if masks:
            masks.result()
        rows = torch.split(logits, [piece.num_rows for piece in plan.due])
        tokens = [_drawn(piece, each) for piece, each in zip(plan.due, rows, strict=True)]
        self.scheduler.learn(plan, seconds + self.watch.lap("sample"))
        events = self.scheduler.accept(plan, tokens)
        self.watch.lap("accept")
        if self.trace:
            self.trace.step(self.scheduler, self.watch, plan, tokens, events)
        return events

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence away before its end and free all that it held. No harm if it has ended."""
        self.scheduler.remove(sequence)
        if self.trace:
            self.trace.aborted(sequence, self.watch.clock())
            if self.scheduler.is_idle:
                self.trace.flush()

    def close(self) -> None:
        """Write what waits for the disk or the trace, and end the threads that do. The engine is of no use any more."""
        if self.trace:
            self.trace.flush()
        if self.shelf:
            self.shelf.store.close()

    def stats(self) -> Stats:
        """What it holds now and has done so far. Numbers may be a step apart when asked from another thread."""
        scheduler, tally = self.scheduler, self.scheduler.tally
        return Stats(
            num_waiting=len(scheduler.waiting),
            num_running=len(scheduler.running),
            num_finished=dict(tally.finished),
            num_aborted=tally.aborted,
            num_failed=tally.failed,
            num_preempted=tally.preempted,
            prompt_tokens=tally.prompt_tokens,
            generated_tokens=tally.generated_tokens,
            computed_tokens=tally.computed_tokens,
            full_pages=PoolStats.of(self.pages.full),
            local_pages=PoolStats.of(self.pages.local),
            hit_tokens=tally.hit_tokens,
            restored_tokens=self.shelf.num_restored if self.shelf else 0,
            disk=self.shelf.store.stats() if self.shelf else None,
            drafted_tokens=tally.drafted_tokens,
            accepted_tokens=tally.accepted_tokens,
            num_steps=self.watch.num_steps,
            seconds=dict(self.watch.seconds),
        )


def _drawn(piece: Piece, logits: Tensor) -> list[int] | HerdError:
    """What a piece's sequence draws from its logits [rows, V], or why it cannot: they are no numbers."""
    try:
        return piece.sequence.sampler.draw(logits, piece.drafts)
    except HerdError as error:
        return error
