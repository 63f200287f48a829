"""How fast an engine is here, and how near to what the machine can do: what `herd bench` prints."""

import random
import statistics
import time
from dataclasses import dataclass

import torch

from herd.chat import Sampling
from herd.engine.engine import Engine
from herd.errors import UsageError
from herd.ops.native import kernels
from herd.text.prompt import Prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """Medians over the rounds."""

    prefill_tok_s: float  # prompt tokens per second, one sequence
    first_token_ms: float  # from a prompt of that length to its first token
    decode_tok_s: float  # one sequence
    batch_tok_s: float  # all sequences together
    decode_gb_s: float  # weight bytes that decoding reads per second, one sequence
    read_gb_s: float  # what this machine reads from memory, measured between the rounds


def measure(engine: Engine, *, prefill: int, decode: int, batch: int, rounds: int) -> Speed:
    """Run random prompts through the engine's own steps. Raises `UsageError` when they do not fit it."""
    for name, value, least in (("prefill", prefill, 1), ("decode", decode, 2), ("batch", batch, 1), ("rounds", rounds, 1)):
        if value < least:
            raise UsageError(f"{name} is {value}; it must be at least {least}", f"raise --{name}", param=name)
    if prefill + decode > engine.context_tokens:
        raise UsageError(f"{prefill} + {decode} tokens are more than the engine's context of {engine.context_tokens:,}", "lower one")
    if batch > engine.config.max_sequences:
        raise UsageError(f"a batch of {batch} is more than max_sequences {engine.config.max_sequences}", "raise --max-sequences")
    numbers = random.Random(0)
    found: dict[str, list[float]] = {"prefill": [], "decode": [], "batch": [], "read": []}
    run_random(engine, numbers, [8], 4)  # first use of everything
    for _ in range(rounds):
        first, _ = run_random(engine, numbers, [prefill], 1)
        _, rest = run_random(engine, numbers, [16], decode)
        _, all_rest = run_random(engine, numbers, [16] * batch, decode)
        found["prefill"].append(first)
        found["decode"].append(rest / (decode - 1))
        found["batch"].append(all_rest / (decode - 1))
        found["read"].append(read_bandwidth())
    median = {name: statistics.median(values) for name, values in found.items()}
    return Speed(
        prefill_tok_s=prefill / median["prefill"],
        first_token_ms=median["prefill"] * 1e3,
        decode_tok_s=1 / median["decode"],
        batch_tok_s=batch / median["batch"],
        decode_gb_s=active_bytes(engine) / median["decode"] / 1e9,
        read_gb_s=median["read"],
    )


def run_random(
    engine: Engine, numbers: random.Random, lengths: list[int], replies: int, vocabulary: int | None = None
) -> tuple[float, float]:
    """Seconds until every sequence has its first token, and seconds from there to the end.

    Random ids below `vocabulary` (the model's size if None) take the place of prompts and of what is drawn, so that sequences stay apart.
    """
    bound = vocabulary or engine.model.vocab_size

    def draw() -> int:
        token = numbers.randrange(bound)
        return token if token != engine.model.patch_id else 0

    sampling = Sampling(temperature=0, max_tokens=replies, ignore_eos=True)
    sequences = []
    for length in lengths:
        prompt = Prompt(tokens=[draw() for _ in range(length)], loss_mask=[False] * length)
        sequences.append(engine.sequence(prompt, sampling, _unheard))
        engine.scheduler.add(sequences[-1])
    start = time.perf_counter()
    first = 0.0
    while not engine.scheduler.is_idle:
        engine.step()
        if not first and all(len(s.tokens) > s.num_prompt for s in sequences):
            first = time.perf_counter() - start
        for sequence in engine.scheduler.running:
            if len(sequence.tokens) > sequence.num_prompt:
                sequence.tokens[-1] = draw()
    return first, time.perf_counter() - start - first


def _unheard(event: object) -> None:
    del event


def active_bytes(engine: Engine) -> int:
    """Bytes of weights that one token passes through; of an embedding that is no head, one row."""
    model, config = engine.runner.model, engine.model
    total = 0
    for name, tensor in model.state_dict().items():
        if name.startswith(("vision.", "projector.")) or (name == "embed.weight" and not config.tied):
            continue
        size = tensor.numel() * tensor.element_size()
        total += size * config.experts_per_token // config.num_experts if ".experts." in name else size
    return total


def read_bandwidth(num_bytes: int = 1 << 29) -> float:
    """GB/s of reading a large tensor with all threads: the most that a step could read its weights at."""
    data, native = torch.ones(num_bytes // 4), kernels()
    if native is not None:
        return native.read_gb_s(data)
    start = time.perf_counter()
    data.sum()
    return num_bytes / (time.perf_counter() - start) / 1e9
