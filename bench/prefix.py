#!/usr/bin/env python3
"""How much sooner does a reply start when the beginning of its prompt was computed before: in memory, and from the disk after a restart?

usage: prefix.py [--tokens 32768] [--save]

A random int4 model of Cria's width with global layers (every fourth of 8) and chunks of 8,192: the time to the first token is real, the
text is not. The prompt ends two tokens after the last chunk, so that what is left to compute is next to nothing.
"""

import argparse
import dataclasses
import datetime
import os
import random
import tempfile
import time
from pathlib import Path

import torch
from versus import cpu

from herd.chat import Sampling
from herd.checkpoint.convert import write
from herd.checkpoint.quantize import quantized
from herd.checkpoint.source import of_model
from herd.engine.config import EngineConfig
from herd.engine.engine import Engine
from herd.engine.local import open_engine
from herd.model.init import init_weights
from herd.model.llama4 import build
from herd.model.presets import CRIA
from herd.text.prompt import Prompt
from herd.text.tokenizer import byte_tokenizer

MODEL = dataclasses.replace(CRIA, num_layers=8, global_step=4, chunk_tokens=8192, context_tokens=1 << 20, vocab_size=512)


def first_token(engine: Engine, tokens: list[int]) -> tuple[float, int, list[int]]:
    """Seconds to the first token, how many tokens of the prompt were not computed, and the reply."""
    prompt = Prompt(tokens=tokens, loss_mask=[False] * len(tokens))
    sequence = engine.sequence(prompt, Sampling(temperature=0, max_tokens=4, ignore_eos=True), _unheard)
    start, first = time.perf_counter(), 0.0
    engine.scheduler.add(sequence)
    while not engine.scheduler.is_idle:
        engine.step()
        first = first or (time.perf_counter() - start if len(sequence.tokens) > len(tokens) else 0.0)
    return first, sequence.num_cached, sequence.tokens[len(tokens) :]


def _unheard(event: object) -> None:
    del event


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32_768, help="of the common beginning, a multiple of 8,192")
    parser.add_argument("--save", action="store_true", help="write the table under bench/results/")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    numbers = random.Random(0)
    tokens = [numbers.randrange(256) for _ in range(arguments.tokens + 2)]
    with tempfile.TemporaryDirectory() as folder:
        source = quantized(of_model(init_weights(build(MODEL, device="cpu")), byte_tokenizer().files()))
        write(source, Path(folder, "model"), "herd")
        config = EngineConfig(prefix_folder=Path(folder, "prefixes"), kv_gib=2)

        def engine() -> Engine:
            return open_engine(Path(folder, "model"), config=config, device="cpu")

        warm = engine()
        first_token(warm, [1] * 64)
        cold, _, want = first_token(warm, tokens)
        memory = min(first_token(warm, tokens)[0] for _ in range(5))
        assert warm.shelf is not None
        warm.shelf.store.flush()
        stored = sum(file.stat().st_size for file in Path(folder, "prefixes").rglob("*") if file.is_file())
        disk = []
        for _ in range(5):
            again = engine()
            first_token(again, [1] * 64)
            seconds, cached, reply = first_token(again, tokens)
            assert cached == arguments.tokens and reply == want, "the prefix has come back, and the reply is the same"
            disk.append(seconds)
    lines = [
        f"# The first token after {arguments.tokens:,} tokens that were computed before",
        "",
        f"Command: `python bench/prefix.py --tokens {arguments.tokens}`, seed 0. {cpu()}, {os.cpu_count()} cores, {warm.threads} threads.",
        "Random int4 model: 8 layers of Cria's width, 2 of them global, chunk 8,192; float32 keys and values. Best of 5; files are warm.",
        "",
        "| | first token, ms | times sooner |",
        "|---|---|---|",
        f"| computed | {cold * 1e3:,.0f} | |",
        f"| from the disk ({stored / 1e6:.0f} MB), a new engine | {min(disk) * 1e3:.1f} | {cold / min(disk):,.0f} |",
        f"| from memory | {memory * 1e3:.1f} | {cold / memory:,.0f} |",
        "",
    ]
    print("\n".join(lines))
    if arguments.save:
        (Path(__file__).parent / "results" / f"prefix_{cpu().split()[0].lower()}_{datetime.date.today():%Y%m%d}.md").write_text(
            "\n".join(lines)
        )


if __name__ == "__main__":
    main()
