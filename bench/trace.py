"""What `--trace` costs: time inside `Trace.step` over the time of steps, while Cria decodes, with the file it writes.

python bench/trace.py [MODEL]
"""

import os
import random
import sys
import tempfile
import time
from pathlib import Path

import torch

from herd.engine.config import EngineConfig
from herd.engine.engine import Engine
from herd.engine.measure import run_random
from herd.engine.opening import open_engine
from herd.engine.trace import Trace, TraceFile

TOKENS = 300


class Timed(Trace):
    """The trace, with a watch on it."""

    seconds = 0.0

    def step(self, *args: object) -> None:
        start = time.perf_counter()
        super().step(*args)  # type: ignore[arg-type]
        self.seconds += time.perf_counter() - start


def measured(engine: Engine, path: Path, sequences: int) -> str:
    """One row of the table."""
    file = TraceFile(path)
    run_random(engine, random.Random(0), [16] * sequences, 8)  # first use of everything
    trace = engine.trace = Timed(file, 1, file.start)
    before, steps = sum(engine.watch.seconds.values()), engine.watch.num_steps
    run_random(engine, random.Random(1), [64] * sequences, TOKENS)
    took, steps = sum(engine.watch.seconds.values()) - before, engine.watch.num_steps - steps
    engine.trace = None
    file.close()
    size = path.stat().st_size / steps
    cost = f"{trace.seconds / steps * 1e6:.1f} | {trace.seconds / took:.2%}"
    return f"| {sequences} | {steps} | {took / steps * 1e3:.2f} | {cost} | {size:,.0f} |"


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "cria"
    engine = open_engine(name, config=EngineConfig(kv_gib=0.5, prefix_cache=False, draft_tokens=0), device="cpu")
    torch.set_num_threads(1)
    print(f"{name}, {os.cpu_count()} cores, {engine.threads} threads\n")
    print("| sequences | steps | ms a step | us of trace a step | share | bytes a step |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for sequences in (1, 4, 16):
            print(measured(engine, Path(folder, "trace.json"), sequences))


if __name__ == "__main__":
    main()
