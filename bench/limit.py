#!/usr/bin/env python3
"""Does a context that is larger than the memory it may use answer, and at what speed? To be run under a hard limit.

usage: limit.py FOLDER [--tokens 8192] [--window-mib 80] [--memory]

    mkdir CGROUP && echo 360M > CGROUP/memory.limit_in_bytes        of version 1; memory.max of version 2
    sh -c 'echo $$ > CGROUP/cgroup.procs; exec python bench/limit.py FOLDER'

The model is random and int4: one global layer between local ones, whose 128 heads of 128 keep 128 KiB a token, so that few tokens take
much room: 8,192 of them 1 GiB. With --memory its pages lie in memory; under the limit that ends in the system's killing the process.
"""

import argparse
import dataclasses
import random
import time
from pathlib import Path

import torch

from herd.chat import Sampling
from herd.checkpoint.convert import write
from herd.checkpoint.quantize import quantized
from herd.checkpoint.source import of_model
from herd.engine.config import EngineConfig
from herd.engine.opening import open_engine
from herd.model.init import init_weights
from herd.model.llama4 import build
from herd.model.presets import TINY
from herd.text.prompt import Prompt
from herd.text.tokenizer import byte_tokenizer

CHUNK = 128
MODEL = dataclasses.replace(
    TINY,
    num_heads=128,
    num_kv_heads=128,
    head_width=128,
    num_experts=0,
    chunk_tokens=CHUNK,
    context_tokens=1 << 16,
    vision=None,
    patch_id=-1,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--window-mib", type=float, default=80)
    parser.add_argument("--memory", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = arguments.folder / "model"
    if not checkpoint.exists():
        write(quantized(of_model(init_weights(build(MODEL, device="cpu"), std=0.15), byte_tokenizer().files())), checkpoint, "herd")
    local_gib = 3 * CHUNK * 128 / 2**20
    config = EngineConfig(
        context_tokens=arguments.tokens + CHUNK,
        kv_folder=None if arguments.memory else arguments.folder,
        kv_gib=8 if arguments.memory else local_gib + max(local_gib, arguments.window_mib / 1024),
        max_sequences=1,
        step_tokens=64,
        draft_tokens=0,
    )
    engine = open_engine(checkpoint, config=config, device="cpu")
    numbers = random.Random(0)
    tokens = [numbers.randrange(256) for _ in range(arguments.tokens)]
    sampling = Sampling(temperature=0, max_tokens=4, ignore_eos=True)
    sequence = engine.sequence(Prompt(tokens=tokens, loss_mask=[False] * len(tokens)), sampling, _unheard)
    engine.scheduler.add(sequence)
    start, used = time.perf_counter(), time.process_time()
    while len(sequence.tokens) == len(tokens):
        engine.step()
    first, first_used = time.perf_counter() - start, time.process_time() - used
    while not engine.scheduler.is_idle:
        engine.step()
    rest = time.perf_counter() - start - first
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    file_mib = engine.pages.file.num_bytes / 2**20 if engine.pages.file else 0
    reply = sequence.tokens[len(tokens) :]
    print(f"prompt of {len(tokens):,}: {first:.0f} s ({first_used:.0f} of CPU); then {rest / 3:.2f} s a token; reply {reply}")
    print(f"file {file_mib:,.0f} MiB, window {engine.pages.capacity.window_bytes / 2**20:.0f} MiB")
    most, own = (int(status[key].split()[0]) / 1024 for key in ("VmHWM", "RssAnon"))
    print(f"resident at most {most:,.0f} MiB, of which {own:,.0f} are no file's")


def _unheard(event: object) -> None:
    del event


if __name__ == "__main__":
    main()
