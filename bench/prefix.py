#!/usr/bin/env python3
"""How much sooner does a reply start when the beginning of its prompt was computed before: in memory, and from the disk after a restart?

usage: prefix.py [--rival LLAMA-SERVER] [--tokens 16384] [--save]

A random int4 Llama 4 of Cria's width, a mixture of experts so that llama.cpp reads it too, with global layers (every fourth of 8) and
chunks of 8,192: the time to the first token is real, the text is not. The prompt ends two tokens after the last chunk, so that what is
left to compute is next to nothing.

llama.cpp's way to the same: `POST /slots/0?action=save`, a new server, `action=restore`, and the prompt once more. Its times are the
server's own (to restore the slot and to compute the prompt), so HTTP is in none. Without --swa-full a restored slot is of no use to a model
with chunks: the whole prompt is computed again. So it is on, and local layers keep the keys of all tokens.
"""

import argparse
import dataclasses
import datetime
import json
import os
import random
import tempfile
import time
from pathlib import Path

import torch
from servers import Server, llama_cpp
from versus import cpu

from herd.chat import Sampling
from herd.checkpoint.convert import write
from herd.checkpoint.quantize import quantized
from herd.checkpoint.source import of_model
from herd.engine.config import EngineConfig
from herd.engine.engine import Engine
from herd.engine.opening import open_engine
from herd.model.init import init_weights
from herd.model.llama4 import build
from herd.model.presets import SCOUT
from herd.text.prompt import Prompt
from herd.text.tokenizer import byte_tokenizer

MODEL = dataclasses.replace(
    SCOUT,
    width=576,
    num_layers=8,
    num_heads=9,
    num_kv_heads=3,
    head_width=64,
    hidden_width=768,
    num_experts=4,
    vocab_size=512,
    context_tokens=1 << 20,
    vision=None,
    bos_id=256,  # this and what follows are the byte tokenizer's
    stop_ids=(257, 260, 261),
    pad_id=262,
    patch_id=-1,
)


def tokenizer() -> dict[str, bytes]:
    """Bytes, and one merge: llama.cpp's server takes no tokenizer without."""
    file = json.loads(byte_tokenizer().files()["tokenizer.json"])
    file["model"]["vocab"]["th"] = len(file["model"]["vocab"])
    file["model"]["merges"] = ["t h"]
    return {"tokenizer.json": json.dumps(file).encode()}


@dataclasses.dataclass(slots=True)
class Times:
    """One side's, in seconds to the first token."""

    computed: float = 0.0
    memory: float = float("inf")
    disk: list[float] = dataclasses.field(default_factory=list)  # a new process or engine each
    stored_bytes: int = 0


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


def ours(folder: Path, tokens: list[int], threads: int) -> Times:
    config = EngineConfig(prefix_folder=folder / "prefixes", kv_gib=2, threads=threads)

    def engine() -> Engine:
        made = open_engine(folder / "model", config=config, device="cpu")
        first_token(made, [1] * 64)
        return made

    times, warm = Times(), engine()
    times.computed, _, want = first_token(warm, tokens)
    times.memory = min(first_token(warm, tokens)[0] for _ in range(5))
    assert warm.shelf is not None
    warm.shelf.store.flush()
    times.stored_bytes = sum(file.stat().st_size for file in (folder / "prefixes").rglob("*") if file.is_file())
    for _ in range(5):
        seconds, cached, reply = first_token(engine(), tokens)
        assert cached == len(tokens) - 2 and reply == want, "the prefix has come back, and the reply is the same"
        times.disk.append(seconds)
    return times


def theirs(binary: str, folder: Path, tokens: list[int], threads: int) -> Times:
    slots = folder / "slots"
    slots.mkdir()
    options = ["-np", "1", "-c", str(len(tokens) + 256), "--swa-full", "--slot-save-path", str(slots)]

    def ask(server: Server, path: str, body: dict[str, object]) -> dict[str, dict[str, float]]:
        status, answer = server.get(path, body)
        assert status == 200, answer
        found: dict[str, dict[str, float]] = json.loads(answer)
        return found

    def prompt(server: Server, prompt: list[int], least: int = 0) -> float:
        timings = ask(server, "/completion", {"prompt": prompt, "n_predict": 1, "temperature": 0, "id_slot": 0})["timings"]
        assert timings["cache_n"] >= least, "the prefix has come back"
        return timings["prompt_ms"] / 1e3

    times = Times()
    with llama_cpp(binary, str(folder / "model.gguf"), threads, *options) as server:
        prompt(server, [1] * 64)
        times.computed = prompt(server, tokens)
        times.memory = min(prompt(server, tokens, len(tokens) - 2) for _ in range(5))
        ask(server, "/slots/0?action=save", {"filename": "prefix.bin"})
        times.stored_bytes = (slots / "prefix.bin").stat().st_size
    for _ in range(5):
        with llama_cpp(binary, str(folder / "model.gguf"), threads, *options) as server:
            prompt(server, [1] * 64)
            restored = ask(server, "/slots/0?action=restore", {"filename": "prefix.bin"})["timings"]["restore_ms"] / 1e3
            times.disk.append(restored + prompt(server, tokens, len(tokens) - 2))
    return times


def rows(name: str, times: Times) -> list[str]:
    disk = min(times.disk)
    return [
        f"| {name}, computed | {times.computed:,.2f} | |",
        f"| {name}, from the disk ({times.stored_bytes / 1e6:.0f} MB) after a restart | {disk:.4f} | {times.computed / disk:,.0f} |",
        f"| {name}, from memory | {times.memory:.4f} | {times.computed / times.memory:,.0f} |",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rival", help="llama.cpp's llama-server, built for this machine; none: herd alone")
    parser.add_argument("--tokens", type=int, default=16_384, help="of the common beginning, a multiple of 8,192")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", action="store_true", help="write the table under bench/results/")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    numbers = random.Random(0)
    tokens = [numbers.randrange(256) for _ in range(arguments.tokens + 2)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = quantized(of_model(init_weights(build(MODEL, device="cpu")), tokenizer()))
        write(source, folder / "model", "herd")
        sides = {"herd": ours(folder, tokens, arguments.threads)}
        if arguments.rival:
            write(source, folder / "model.gguf", "gguf")
            sides["llama.cpp"] = theirs(arguments.rival, folder, tokens, arguments.threads)
    said = []
    if arguments.rival:
        us, them = sides.values()
        said = [
            f"**The first token is there {them.computed / us.computed:.1f} times sooner than llama.cpp's where the prefix is computed, "
            f"{min(them.disk) / min(us.disk):.2f} times from the disk, {them.memory / us.memory:.2f} times from memory.**",
            "",
        ]
    rival = " --rival llama-server" if arguments.rival else ""
    report = "\n".join(
        [
            f"# The first token after {arguments.tokens:,} tokens that were computed before",
            "",
            f"Command: `python bench/prefix.py --tokens {arguments.tokens}{rival}`, seed 0. {cpu()}, {os.cpu_count()} cores, "
            f"{arguments.threads} threads.",
            "Random int4 Llama 4 of Cria's width: 8 layers, 2 of them global, 4 experts, chunk 8,192. Keys and values: "
            "float16 on both sides. Best of 5, computed once; files are in the system's memory.",
            "llama.cpp with --swa-full: without it what a restored slot holds is computed again. herd restores by itself, by what a prompt "
            "begins with.",
            "",
            "| | first token, s | times sooner than computed |",
            "|---|---|---|",
            *(row for name, times in sides.items() for row in rows(name, times)),
            "",
            *said,
        ]
    )
    print(report)
    if arguments.save:
        (Path(__file__).parent / "results" / f"prefix_{cpu().split()[0].lower()}_{datetime.date.today():%Y%m%d}.md").write_text(report)


if __name__ == "__main__":
    main()
