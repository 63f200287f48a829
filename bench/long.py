#!/usr/bin/env python3
"""A million tokens in one prompt: is the answer right, does memory follow the formula, and do local layers keep their speed?

usage: long.py FOLDER [--tokens 1048576] [--chunk 8192] [--heads 2] [--window-mib 8] [--threads 1] [--save]
               [--parts local,memory,file,reference] [--thin]

FOLDER takes the model and the progress of every part, line by line; a part that was cut short goes on from the chunks that it stored there.
Parts may run at the same time, from several calls; the table is made of what is there. With --thin the global layer looks back only in
those steps in which a sampled position lies, and in the others no further than the step: the keys and values that it keeps are the same to
the bit, for they come from the local layers before it, and nothing that is sampled depends on the rest. A million tokens then take minutes.

The model is random, int4, shaped like `tiny` with a global layer between local ones (local, local, local, global, local), so that what the
global layer makes of a million keys passes through a local layer before it is read. Scores of the global layer are spread widely, so that
keys count very unequally: with a plain random model every query would see the mean of all values, whatever was lost of them.

The answer is held against another road (`longroad.py`): no pages, no native kernels, weights as plain floats.
"""

import argparse
import dataclasses
import datetime
import json
import os
import random
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from longroad import plain_model, reference
from torch import Tensor
from versus import cpu

from herd.chat import Sampling
from herd.checkpoint.convert import write
from herd.checkpoint.quantize import quantized
from herd.checkpoint.source import of_model
from herd.engine.config import EngineConfig
from herd.engine.engine import Engine
from herd.engine.inputs import Inputs
from herd.engine.opening import open_engine
from herd.model.config import ModelConfig
from herd.model.init import init_weights
from herd.model.llama4 import build
from herd.model.presets import TINY
from herd.model.size import kv_bytes, record_bytes
from herd.ops.attend import Reach
from herd.text.prompt import Prompt
from herd.text.tokenizer import byte_tokenizer

REPLY = 4  # tokens
PAGE = 256  # tokens: with heads this narrow a page is 32 KB; of Scout, one of 16 tokens is 131 KB
SPREAD, LOUD = 1.4, 4.0  # factors on the global layer's queries and keys, and on its output


def model_config(chunk: int, heads: int) -> ModelConfig:
    """Of `tiny`, but text alone, one head for keys and values, and one more layer."""
    return dataclasses.replace(
        TINY, num_layers=5, num_heads=heads, num_kv_heads=1, chunk_tokens=chunk, temperature_floor=chunk, context_tokens=1 << 21,
        vision=None, patch_id=-1,
    )  # fmt: skip


def make_model(folder: Path, config: ModelConfig) -> Path:
    """Write the model, if it is not there."""
    if not folder.exists():
        model = init_weights(build(config, device="cpu"), std=0.15)
        for layer in config.global_layers:
            for part, factor in (("q", SPREAD), ("k", SPREAD), ("o", LOUD)):
                model.get_parameter(f"layers.{layer}.attention.{part}.weight").data *= factor
        partial = folder.with_name(f"{folder.name}.{os.getpid()}")
        write(quantized(of_model(model, byte_tokenizer().files())), partial, "herd")
        partial.replace(folder)
    return folder


def prompt_of(tokens: int) -> list[int]:
    numbers = random.Random(0)
    return [numbers.randrange(256) for _ in range(tokens)]


def sampled(tokens: int, chunk: int) -> list[int]:
    """Positions: the first two of some chunks, which cost the other road little, and the prompt's last."""
    starts = [(c * (tokens // chunk) // 16 + 1) * chunk for c in range(16)]
    return sorted({start + i for start in starts for i in (0, 1) if start + i < tokens} | {tokens - 1})


# --- the engine


class Listening:
    """A runner that also asks for the logits of sampled positions."""

    def __init__(self, engine: Engine, positions: list[int], *, thin: bool) -> None:
        self._runner, self._positions, self._thin = engine.runner, positions, thin
        self.is_whole = True  # whether the last step's global layer has looked back over everything
        self.heard: dict[int, list[float]] = {}
        self.see = engine.runner.see
        engine.runner = self  # type: ignore[assignment]

    def __call__(self, inputs: Inputs) -> Tensor:
        (start,), count = inputs.starts, len(inputs.tokens)
        due = inputs.rows.tolist()
        extra = [p - start for p in self._positions if start <= p < start + count and p - start not in due]
        self.is_whole = not self._thin or bool(extra or due)
        if not self.is_whole:
            full = inputs.attend.full
            assert full is not None
            inputs.attend.full = Reach([full.tables[0][start // full.page_tokens :]], [count], full.page_tokens)
        logits = self._runner(dataclasses.replace(inputs, rows=torch.tensor(extra + due, dtype=torch.int64)))
        self.heard |= {start + row: each.tolist() for row, each in zip(extra + due, logits, strict=True)}
        return logits[len(extra) :]


def memory() -> dict[str, int]:
    """Bytes in memory now: all, the most since `forget_peak`, and of files."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[key].split()[0]) * 1024 for name, key in (("now", "VmRSS"), ("peak", "VmHWM"), ("files", "RssFile"))}


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


class Looking(threading.Thread):
    """Reads again and again, while others compute, how many more bytes of files are in this process's memory than at first."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.first = self.most = memory()["files"]
        self.times = 0
        self._ends = threading.Event()

    def run(self) -> None:
        while not self._ends.wait(0.05):
            self.most = max(self.most, memory()["files"])
            self.times += 1

    def end(self) -> dict[str, int]:
        self._ends.set()
        self.join()
        return {"mapped": self.most - self.first, "looks": self.times}


def compute(folder: Path, part: str, tokens: list[int], model: ModelConfig, config: EngineConfig, *, thin: bool = False) -> dict[str, Any]:
    """Run the prompt and a reply through the engine; what was seen is added to a file, a line for each step, and is given back."""
    path = folder / f"{part}.jsonl"
    chunk = model.chunk_tokens or 0
    if part == "local":
        model = dataclasses.replace(model, global_step=None)
    engine = open_engine(make_model(folder / f"model-{'local' if part == 'local' else 'whole'}", model), config=config, device="cpu")
    run(engine, [1] * (chunk + 1), 1, [], None)  # what the kernels work in is there from now on
    facts = {"threads": engine.threads, "peak_flops": peak_flops(), "window_bytes": engine.pages.capacity.window_bytes}
    engine.pages.let_go()
    looking = Looking()
    looking.start()
    forget_peak()
    with path.open("a") as lines:
        lines.write(json.dumps({"base": None, **facts}) + "\n")
        run(engine, tokens, REPLY, sampled(len(tokens), chunk), lines, thin=thin and part != "local")
        lines.write(json.dumps(looking.end()) + "\n")
    return progress(path)


def run(engine: Engine, tokens: list[int], max_tokens: int, positions: list[int], lines: Any, *, thin: bool = False) -> None:
    """One prompt, step by step."""
    prompt = Prompt(tokens=tokens, loss_mask=[False] * len(tokens))
    sequence = engine.sequence(prompt, Sampling(temperature=0, max_tokens=max_tokens, ignore_eos=True), _unheard)
    plain = engine.runner
    listening = Listening(engine, positions, thin=thin)
    engine.scheduler.add(sequence)
    while not engine.scheduler.is_idle:
        start, used = time.perf_counter(), time.process_time()
        engine.step()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - used
        if lines is None:
            continue
        stop = sequence.num_computed if sequence.finish is None else len(sequence.tokens) - 1
        line = {"stop": stop, "seconds": seconds, "cpu": cpu_seconds, "memory": memory(), "load": os.getloadavg()[0]}
        line |= {"logits": listening.heard, "whole": listening.is_whole}
        listening.heard = {}
        lines.write(json.dumps(line) + "\n")
        lines.flush()
        sys.stderr.write(f"{stop:,} of {len(tokens):,} tokens, {seconds:.2f} s, {line['memory']['now'] / 2**20:.1f} MiB\n")
    engine.runner = plain
    if lines is not None:
        reply = sequence.tokens[len(tokens) :]
        lines.write(json.dumps({"reply": reply, "stages": engine.watch.seconds, "cached": sequence.num_cached}) + "\n")


def _unheard(event: object) -> None:
    del event


def progress(path: Path) -> dict[str, Any]:
    """What a part has written so far: its steps by their ends, its logits by position, and its reply.

    base, peak: bytes resident after the first step of the last process, and the most then and later.
    """
    found: dict[str, Any] = {"steps": {}, "logits": {}, "base": None, "reply": None}
    for text in path.read_text().splitlines() if path.exists() else ():
        line = json.loads(text)
        if "base" in line:  # a process has begun
            found |= line | {"base": None, "peak": 0}
        elif "stop" in line:
            found["base"] = found["base"] or line["memory"]["now"]
            found["peak"] = max(found["peak"], line["memory"]["peak"])
            found["steps"][line["stop"]] = line
            found["logits"] |= {int(position): torch.tensor(logits) for position, logits in line["logits"].items()}
        else:
            found |= line
    return found


# --- the other road (longroad.py)


def compute_reference(folder: Path, tokens: list[int], model: ModelConfig) -> dict[str, Any]:
    """The other road to the sampled positions and to a reply of its own."""
    engine = open_engine(make_model(folder / "model-whole", model), config=EngineConfig(kv_gib=0.1, kv="fp32"), device="cpu")
    plain = plain_model(engine.runner.model)
    logits, without = reference(
        plain, tokens, sampled(len(tokens), model.chunk_tokens or 0), REPLY, lambda text: sys.stderr.write(text + "\n")
    )
    found = {"logits": logits, "without": without}
    torch.save(found, folder / "reference.pt")
    return found


# --- the table


def differences(found: dict[int, Tensor], wanted: dict[int, Tensor]) -> list[float]:
    """Largest difference of the logits at each position, in standard deviations of the wanted ones."""
    return [float((found[p] - wanted[p]).abs().max() / wanted[p].std()) for p in wanted if p in found]


def report(folder: Path, tokens: int, model: ModelConfig, window_mib: float) -> list[str]:
    """The table, of what is there."""
    parts = {name: progress(folder / f"{name}.jsonl") for name in ("local", "memory", "file")}
    chunk = model.chunk_tokens or 0
    grows = (kv_bytes(model, tokens, "fp32") - kv_bytes(model, chunk, "fp32")) / 2**20
    lines = [
        f"# {tokens:,} tokens in one prompt",
        "",
        f"Command: `python bench/long.py FOLDER --tokens {tokens} --chunk {chunk} --heads {model.num_heads} --window-mib {window_mib:g}`.",
        f"{cpu()}, {os.cpu_count()} cores, shared with other work: the load is the system's, ours included. Steps of {chunk:,} tokens.",
        "",
        f"Random int4 model: layers local, local, local, global, local; width {model.width}, {model.num_heads} heads of {model.head_width}",
        f"on one of keys and values, in float32; pages of {PAGE} tokens. What the global layer keeps grows by {grows:.1f} MiB after the",
        "first chunk. Steps: those in which the global layer looked back over all before it. With --thin these are the steps with a",
        "sampled position, on which nothing of the others but their keys and values bears.",
        "",
        "| | steps | tokens/s | seconds | CPU seconds | threads | load | of float32 peak | memory grows, MiB | formula | decode, ms |",
        "|---" * 11 + "|",
    ]
    window = parts["file"].get("window_bytes", window_mib * 2**20) / 2**20
    labels = {
        "local": ("local layers alone", 0.0),
        "memory": ("pages in memory", grows + (record_bytes(model, tokens, PAGE) - record_bytes(model, chunk, PAGE)) / 2**20),
        "file": (f"pages in a file, at most {window:g} MiB of it in memory", window),
    }
    for name, (label, formula) in labels.items():
        if parts[name]["steps"]:
            cells = row(parts[name], tokens, model, is_local=name == "local")
            lines.append(f"| {label} | {cells} | {formula:.1f} | {decoding(parts[name], tokens)} |")
    if parts["file"].get("looks"):
        most, looks = parts["file"]["mapped"] / 2**20, parts["file"]["looks"]
        lines += [
            "",
            f"Of the file at most {most:.1f} MiB were in memory (by {looks:,} looks while the last process computed); the rest",
        ]
        lines += ["of what memory grew by are chunks on their way to the disk tier or back, 1 MiB each."]
    lines += ["", *by_position(parts, tokens, chunk), ""]
    if (folder / "reference.pt").exists():
        lines += answers(parts, torch.load(folder / "reference.pt"), tokens)
    return lines


def row(part: dict[str, Any], tokens: int, model: ModelConfig, *, is_local: bool) -> str:
    """Cells of one part; what is counted as work is the multiplications and additions of attention alone."""
    steps = [step for stop, step in part["steps"].items() if stop <= tokens and step.get("whole", True)]
    computed = len(steps) * (model.chunk_tokens or 0)
    seconds, used = sum(step["seconds"] for step in steps), sum(step["cpu"] for step in steps)
    grown = (part["peak"] - part["base"]) / 2**20
    load = statistics.mean(step["load"] for step in steps)
    chunk = model.chunk_tokens or 0
    pairs = sum(chunk * (step["stop"] - chunk / 2) for step in steps)  # that the global layer weighs
    pairs = (0 if is_local else pairs) + 4 * computed * chunk / 2
    share = pairs * 4 * model.num_heads * model.head_width / used / part["peak_flops"]
    work = f"{len(steps)} of {tokens // chunk} | {computed / seconds:,.0f} | {seconds:,.0f} | {used:,.0f}"
    return f"{work} | {part['threads']} | {load:.1f} | {share:.0%} | {grown:.1f}"


def decoding(part: dict[str, Any], tokens: int) -> str:
    decoded = [step["seconds"] * 1e3 for stop, step in part["steps"].items() if stop > tokens]
    return f"{statistics.median(decoded):.1f}" if decoded else ""


def peak_flops() -> float:
    """float32 operations a second of one thread of torch's matrix product, the best of a few."""
    a = torch.randn(768, 768)
    best = float("inf")
    for _ in range(10):
        start = time.thread_time()
        a @ a
        best = min(best, time.thread_time() - start)
    return 2 * 768**3 / best


def by_position(parts: dict[str, Any], tokens: int, chunk: int) -> list[str]:
    """CPU time per token at each eighth of the prompt."""
    lines = ["CPU time per token in us, the median of the steps in each eighth of the prompt:", ""]
    lines += ["| |" + "".join(f" {i}/8 |" for i in range(1, 9)), "|---" * 9 + "|"]
    for name, part in parts.items():
        cells = []
        for i in range(8):
            steps = [step for stop, step in part["steps"].items() if tokens * i // 8 < stop <= tokens * (i + 1) // 8]
            chosen = [step["cpu"] / chunk * 1e6 for step in steps if step.get("whole", True)]
            cells.append(f" {statistics.median(chosen):.1f} |" if chosen else " |")
        lines.append(f"| {name} |" + "".join(cells))
    return lines


def answers(parts: dict[str, Any], other: dict[str, Any], tokens: int) -> list[str]:
    """How near the engine's logits come to the other road's, and how far off they would be if keys were lost."""
    lines = []
    for name in ("memory", "file"):
        found = differences(parts[name]["logits"], other["logits"])
        if found:
            lines.append(
                f"Pages in {name}: logits at {len(found)} positions differ from the other road's by at most {max(found):.4f} of their "
                f"standard deviation (median {statistics.median(found):.4f}); reply {parts[name]['reply']}."
            )
    memory_logits, file_logits = (parts[name]["logits"] for name in ("memory", "file"))
    if both := memory_logits.keys() & file_logits.keys():
        same = sum(torch.equal(memory_logits[p], file_logits[p]) for p in both)
        lines.append(f"In memory and in the file: the same bits at {same} of {len(both)} positions.")
    lines.append(f"Greedy reply of the other road: {[int(other['logits'][p].argmax()) for p in range(tokens - 1, tokens + REPLY - 1)]}.")
    probe, without = other["without"]
    moved = sorted(differences(dict(enumerate(without)), dict.fromkeys(range(len(without)), other["logits"][probe])))
    lines.append(
        f"Were the global layer to lose one chunk's keys, logits at position {probe:,} would move by {moved[len(moved) // 2]:.4f} (median "
        f"over the {len(moved)} chunks before it; least {moved[0]:.4f}, most {moved[-1]:.3f})."
    )
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=1 << 20, help="a multiple of 16 chunks")
    parser.add_argument("--chunk", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=2, help="that share one of keys and values")
    parser.add_argument("--window-mib", type=float, default=8, help="of the file, what may be in memory")
    parser.add_argument("--parts", default="local,memory,file,reference", help="what to compute; none: only the table")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--thin", action="store_true", help="global attention only where a sampled position needs it")
    parser.add_argument("--save", action="store_true", help="write the table under bench/results/")
    arguments = parser.parse_args()
    folder, model = arguments.folder, model_config(arguments.chunk, arguments.heads)
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    tokens = prompt_of(arguments.tokens)
    for part in filter(None, arguments.parts.split(",")):
        if part == "reference":
            compute_reference(folder, tokens, model)
            continue
        if len(arguments.parts.split(",")) > 1:  # each in a process of its own, whose memory is then its own too
            command = [sys.executable, __file__, *sys.argv[1:], "--parts", part]
            if os.spawnv(os.P_WAIT, sys.executable, [word for word in command if word != "--save"]):
                sys.exit(f"error: {part} ended early")
            continue
        config = choices(folder, part, len(tokens), model, arguments.window_mib, arguments.threads)
        compute(folder, part, tokens, model, config, thin=arguments.thin)
    lines = report(folder, len(tokens), model, arguments.window_mib)
    print("\n".join(lines))
    if arguments.save:
        name = f"long_{len(tokens)}_{cpu().split()[0].lower()}_{datetime.date.today():%Y%m%d}.md"
        (Path(__file__).parent / "results" / name).write_text("\n".join(lines))


def choices(folder: Path, part: str, tokens: int, model: ModelConfig, window_mib: float, threads: int) -> EngineConfig:
    """Of one sequence at a time; a step is a chunk."""
    chunk = model.chunk_tokens or 0
    local_gib = kv_bytes(dataclasses.replace(model, global_step=None, num_layers=4), chunk, "fp32") / 2**30
    sizes = {"context_tokens": tokens + chunk, "max_sequences": 1, "step_tokens": chunk, "page_tokens": min(PAGE, chunk)}
    common: dict[str, Any] = {**sizes, "draft_tokens": 0, "kv": "fp32", "threads": threads}
    if part == "local":  # without global layers nothing before the last chunk has a way to the answer, and a cache would skip it
        return EngineConfig(kv_gib=4, prefix_cache=False, **common)
    common["prefix_folder"] = folder / f"{part}-prefixes"
    if part == "file":
        return EngineConfig(kv_folder=folder, kv_disk_gib=8, kv_gib=local_gib + max(local_gib, window_mib / 1024), **common)
    return EngineConfig(kv_gib=4, **common)


if __name__ == "__main__":
    main()
