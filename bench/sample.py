"""What does drawing one token cost? herd's native road against torch's own, over the vocabulary of Llama 4.

    OMP_NUM_THREADS=1 python bench/sample.py

The rival is what most engines do: float32, topk where top_k is asked for, a descending sort where top_p is, softmax, cumsum, and a draw by
`torch.multinomial`. The bound is one read of the logits at the bandwidth of a sum over them, as warm as they are after the head.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from herd.ops.native import kernels
from herd.ops.sample import Draw

VOCABULARY = 202_048
LIMITS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "no limit, 1.0": {"temperature": 1.0},
    "no limit, 0.6": {"temperature": 0.6},
    "top_p 0.9, 1.0": {"temperature": 1.0, "top_p": 0.9},
    "top_p 0.9, 0.6": {"temperature": 0.6, "top_p": 0.9},
    "top_k 40, 0.8": {"temperature": 0.8, "top_k": 40},
    "min_p 0.05, 1.0": {"temperature": 1.0, "min_p": 0.05},
    "all three, 0.8": {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.05},
}


def logits_of(kind: str, seed: int) -> Tensor:
    """flat: normal, deviation 3, 90% of whose mass is thousands of tokens. led: 50 tokens 8 to 16 ahead of that. sure: one, 30 ahead."""
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3
    if kind == "led":
        logits[1000:1050] += torch.linspace(16, 8, 50)
    if kind == "sure":
        logits[1000] += 30
    return logits


def rival(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> int:
    """Torch's own road."""
    if temperature == 0:
        return int(logits.argmax())
    logits = logits / temperature
    ids: Tensor | None = None
    if top_k:
        logits, ids = logits.topk(top_k)
    elif top_p < 1:
        logits, ids = logits.sort(descending=True)
    probs = logits.softmax(-1)
    if top_p < 1:
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0)
    if min_p:
        probs = probs.masked_fill(probs < min_p * probs.max(), 0)
    place = int(probs.multinomial(1))
    return place if ids is None else int(ids[place])


def milliseconds(call: Callable[[], object], repetitions: int) -> tuple[float, float]:
    """Median and best."""
    times = []
    for _ in range(repetitions):
        start = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - start) / 1e6)
    return statistics.median(times), min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repetitions", type=int, default=200)
    options = parser.parse_args()
    native = kernels()
    if native is None:
        raise SystemExit("error: the native kernels are not built here\nhint: install a C++ compiler and herd again")
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(options.seed)
    bound, _ = milliseconds(logits_of("flat", options.seed).sum, options.repetitions)
    print(f"{VOCABULARY:,} logits, {native.path}, seed {options.seed}, {options.repetitions} repetitions; one read takes {bound:.3f} ms\n")
    print("| logits | limits, temperature | herd ms | best | torch ms | best | ratio | share of one read |")
    print("|---|---|---|---|---|---|---|---|")
    for kind in ("flat", "led", "sure"):
        logits = logits_of(kind, options.seed)
        for name, limits in LIMITS.items():

            def ours(logits: Tensor = logits, limits: dict[str, float] = limits) -> int:
                point = float(torch.rand((), generator=generator, dtype=torch.float64))
                return native.sample(logits, Draw(point=point, **limits))  # type: ignore[arg-type]

            def theirs(logits: Tensor = logits, limits: dict[str, float] = limits) -> int:
                return rival(logits, **limits)  # type: ignore[arg-type]

            mine, best = milliseconds(ours, options.repetitions)
            other, other_best = milliseconds(theirs, max(options.repetitions // 10, 1))
            ratio, share = other / mine, bound / mine
            print(f"| {kind} | {name} | {mine:.3f} | {best:.3f} | {other:.2f} | {other_best:.2f} | {ratio:.0f} | {share:.0%} |", flush=True)


if __name__ == "__main__":
    main()
