"""How fast an engine is here, and how near to what the machine can do: what `herd bench` prints."""

import random
import statistics
import time
from dataclasses import dataclass

import torch

from herd.chat import Sampling
from herd.engine.engine import Engine
from herd.errors import UsageError
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
    if prefill + decode > engine.context_tokens:
        raise UsageError(f"{prefill} + {decode} tokens are more than the engine's context of {engine.context_tokens:,}", "lower one")
    if batch > engine.config.max_sequences:
        raise UsageError(f"a batch of {batch} is more than max_sequences {engine.config.max_sequences}", "raise --max-sequences")
    numbers = random.Random(0)
    found: dict[str, list[float]] = {"prefill": [], "decode": [], "batch": [], "read": []}
    _run(engine, numbers, [8], 4)  # first use of everything
    for _ in range(rounds):
        first, _ = _run(engine, numbers, [prefill], 1)
        _, rest = _run(engine, numbers, [16], decode)
        _, all_rest = _run(engine, numbers, [16] * batch, decode)
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


def _run(engine: Engine, numbers: random.Random, lengths: list[int], replies: int) -> tuple[float, float]:
    """Seconds until every sequence has its first token, and seconds from there to the end."""
    sampling = Sampling(temperature=0, max_tokens=replies, ignore_eos=True)
    for length in lengths:
        tokens = [numbers.randrange(engine.model.vocab_size) for _ in range(length)]
        tokens = [token if token != engine.model.patch_id else 0 for token in tokens]
        prompt = Prompt(tokens=tokens, loss_mask=[False] * length)
        engine.scheduler.add(engine.sequence(prompt, sampling, _unheard))
    start = time.perf_counter()
    first = 0.0
    while not engine.scheduler.is_idle:
        engine.step()
        running = engine.scheduler.running
        if not first and not engine.scheduler.waiting and all(len(s.tokens) > s.num_prompt for s in running):
            first = time.perf_counter() - start
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
    """GB/s of summing a large float32 tensor: the most that a step could read its weights at."""
    data = torch.ones(num_bytes // 4)
    start = time.perf_counter()
    data.sum()
    return num_bytes / (time.perf_counter() - start) / 1e9
