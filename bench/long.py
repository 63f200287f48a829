#!/usr/bin/env python3
"""A million tokens in one prompt: is the answer right, does memory follow the formula, and do local layers keep their speed?

usage: long.py FOLDER [--tokens 1048576] [--chunk 8192] [--heads 2] [--window-mib 8] [--threads 1] [--save]
               [--parts local,memory,file,reference]

FOLDER takes the model and the progress of every part, line by line; a part that was cut short goes on from the chunks that it stored there.
Parts may run at the same time, from several calls; the table is made of what is there.

The model is random, int4, shaped like `tiny` with a global layer between local ones (local, local, local, global, local), so that what the
global layer makes of a million keys passes through a local layer before it is read. Scores of the global layer are spread widely, so that
keys count very unequally: with a plain random model every query would see the mean of all values, whatever was lost of them.

The answer is held against another road: no pages, no native kernels, weights as plain floats. Local layers are computed chunk by chunk by
torch's attention; the global layer at sampled positions only, over blocks of keys whose sums are joined in float64.
"""

import argparse
import dataclasses
import datetime
import json
import math
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from versus import cpu

from herd.chat import Sampling
from herd.checkpoint.convert import write
from herd.checkpoint.quantize import quantized
from herd.checkpoint.source import of_model
from herd.engine.config import EngineConfig
from herd.engine.engine import Engine
from herd.engine.inputs import Inputs
from herd.engine.local import open_engine
from herd.model.attention import Places
from herd.model.config import ModelConfig
from herd.model.init import init_weights
from herd.model.llama4 import Llama4, build
from herd.model.presets import TINY
from herd.model.size import kv_bytes, record_bytes
from herd.ops.attend import Packed
from herd.ops.int4 import dequantize
from herd.text.prompt import Prompt
from herd.text.tokenizer import byte_tokenizer

GLOBAL = 3  # the layer
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

    def __init__(self, engine: Engine, positions: list[int]) -> None:
        self._runner, self._positions = engine.runner, positions
        self.heard: dict[int, list[float]] = {}
        self.see = engine.runner.see
        engine.runner = self  # type: ignore[assignment]

    def __call__(self, inputs: Inputs) -> Tensor:
        (start,), count = inputs.starts, len(inputs.tokens)
        due = inputs.rows.tolist()
        extra = [p - start for p in self._positions if start <= p < start + count and p - start not in due]
        logits = self._runner(dataclasses.replace(inputs, rows=torch.tensor(extra + due, dtype=torch.int64)))
        self.heard |= {start + row: each.tolist() for row, each in zip(extra + due, logits, strict=True)}
        return logits[len(extra) :]


def memory() -> dict[str, int]:
    """Bytes in memory now: all, the most since `forget_peak`, and of files."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[key].split()[0]) * 1024 for name, key in (("now", "VmRSS"), ("peak", "VmHWM"), ("files", "RssFile"))}


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def compute(folder: Path, part: str, tokens: list[int], model: ModelConfig, config: EngineConfig) -> dict[str, Any]:
    """Run the prompt and a reply through the engine; what was seen is added to a file, a line for each step, and is given back."""
    path = folder / f"{part}.jsonl"
    chunk = model.chunk_tokens or 0
    if part == "local":
        model = dataclasses.replace(model, global_step=None)
    engine = open_engine(make_model(folder / f"model-{'local' if part == 'local' else 'whole'}", model), config=config, device="cpu")
    run(engine, [1] * (chunk + 1), 1, [], None)  # what the kernels work in is there from now on
    facts = {"threads": engine.threads, "peak_flops": peak_flops(), "window_bytes": engine.pages.capacity.window_bytes}
    base = memory()
    forget_peak()
    with path.open("a") as lines:
        lines.write(json.dumps({"base": base, **facts}) + "\n")
        run(engine, tokens, REPLY, sampled(len(tokens), chunk), lines)
    return progress(path)


def run(engine: Engine, tokens: list[int], max_tokens: int, positions: list[int], lines: Any) -> None:
    """One prompt, step by step."""
    prompt = Prompt(tokens=tokens, loss_mask=[False] * len(tokens))
    sequence = engine.sequence(prompt, Sampling(temperature=0, max_tokens=max_tokens, ignore_eos=True), _unheard)
    plain = engine.runner
    listening = Listening(engine, positions)
    engine.scheduler.add(sequence)
    while not engine.scheduler.is_idle:
        start, used = time.perf_counter(), time.process_time()
        engine.step()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - used
        if lines is None:
            continue
        stop = sequence.num_computed if sequence.finish is None else len(sequence.tokens) - 1
        line = {"stop": stop, "seconds": seconds, "cpu": cpu_seconds, "memory": memory(), "load": os.getloadavg()[0]}
        line["logits"] = listening.heard
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
    """What a part has written so far: its steps by their ends, its logits by position, the memory before and its reply."""
    found: dict[str, Any] = {"steps": {}, "logits": {}, "base": None, "reply": None}
    for text in path.read_text().splitlines() if path.exists() else ():
        line = json.loads(text)
        if "stop" in line:
            found["steps"][line["stop"]] = line
            found["logits"] |= {int(position): torch.tensor(logits) for position, logits in line["logits"].items()}
        else:
            found |= line
    return found


# --- the other road


def plain_model(blocks: Llama4) -> Llama4:
    """The same weights as plain floats."""
    model = build(blocks.config, device="cpu")
    wanted = {name: p.shape for name, p in model.named_parameters()}
    values = {name: dequantize(t, torch.float32) if t.dtype == torch.uint8 else t for name, t in blocks.state_dict().items()}
    model.load_state_dict({name: value.view(wanted[name]) for name, value in values.items()})
    return model.eval()


class Caught:
    """Attention that only takes down its keys and values."""

    def __call__(self, layer: int, is_local: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        del layer, is_local
        self.k, self.v = k, v
        return torch.zeros_like(q)


class Full:
    """Attention of a few queries from position `start` on to all keys [m, K] before them and their own, block by block."""

    def __init__(self, keys: Tensor, values: Tensor, start: int, block: int, without: int | None = None) -> None:
        self.keys, self.values, self.start, self.block, self.without = keys, values, start, block, without

    def __call__(self, layer: int, is_local: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        del layer, is_local, k, v
        return torch.cat([self.some(part, self.start + 128 * i) for i, part in enumerate(q.split(128))])

    def some(self, q: Tensor, start: int) -> Tensor:
        """q: [n, H, K] from position `start` on -> [n, H, K]."""
        n, H, K = q.shape
        rows = q.reshape(n * H, K) / math.sqrt(K)
        position = torch.arange(start, start + n).repeat_interleave(H)[:, None]
        most = torch.full((n * H, 1), -math.inf, dtype=torch.float64)
        total, acc = torch.zeros(n * H, 1, dtype=torch.float64), torch.zeros(n * H, K, dtype=torch.float64)
        for first in range(0, start + n, self.block):
            if first // self.block == self.without:
                continue
            keys, values = self.keys[first : min(start + n, first + self.block)], self.values[first : min(start + n, first + self.block)]
            scores = rows @ keys.T  # [n * H, block]
            if first + len(keys) > start:
                scores.masked_fill_(torch.arange(first, first + len(keys)) > position, -math.inf)
            largest = torch.maximum(most, scores.amax(1, keepdim=True).double())
            weights = scores.sub_(largest.float()).exp_()
            keep = (most - largest).exp()
            # what float32 rounds of `largest` is the same in both sums of this block and of no account
            total, acc, most = total * keep + weights.sum(1, keepdim=True).double(), acc * keep + (weights @ values).double(), largest
        return (acc / total).float().view(n, H, K)


@torch.inference_mode()
def reference(model: Llama4, tokens: list[int], positions: list[int], say: Any = None) -> tuple[dict[int, Tensor], dict[int, list[Tensor]]]:
    """Logits at positions, by the other road; and at the first of them in the second half, those without each block of keys in turn."""
    config, chunk = model.config, model.config.chunk_tokens
    assert config.global_layers == (GLOBAL,) and chunk is not None and config.num_kv_heads == 1
    ends: dict[int, int] = {}  # of each chunk that a position lies in, the last one
    for position in positions:
        ends[position // chunk] = max(position + 1, ends.get(position // chunk, 0))
    keys, values = torch.empty(len(tokens), config.head_width), torch.empty(len(tokens), config.head_width)
    before: dict[int, Tensor] = {}  # what comes to the global layer, of the chunks that are wanted
    for start in range(0, len(tokens), chunk):
        part = torch.tensor(tokens[start : start + chunk])
        places = Places.of(config, torch.arange(start, start + len(part)))
        x = model.embed(part)
        for block in model.layers[:GLOBAL]:
            x = block(x, places, Packed([len(part)], None))
        block, caught = model.layers[GLOBAL], Caught()
        block.attention(block.attention_norm(x), places, caught)
        keys[start : start + len(part)], values[start : start + len(part)] = caught.k[:, 0], caught.v[:, 0]
        if start // chunk in ends:
            before[start // chunk] = x[: ends[start // chunk] - start]
        if say:
            say(f"the other road: {start + len(part):,} tokens of local layers")

    def logits(c: int, without: int | None = None) -> Tensor:
        x, start = before[c], c * chunk
        places = Places.of(config, torch.arange(start, start + len(x)))
        x = model.layers[GLOBAL](x, places, Full(keys, values, start, chunk, without))
        for block in model.layers[GLOBAL + 1 :]:
            x = block(x, places, Packed([len(x)], None))
        return model.logits(x)

    found: dict[int, Tensor] = {}
    for c in before:
        rows = logits(c)
        found |= {position: rows[position - c * chunk] for position in positions if position // chunk == c}
        if say:
            say(f"the other road: chunk {c}")
    probe = next(p for p in positions if p >= len(tokens) // 2 and p % chunk == 0)
    return found, {probe: [logits(probe // chunk, without)[0] for without in range(probe // chunk)]}


def compute_reference(folder: Path, tokens: list[int], model: ModelConfig, reply: list[int]) -> dict[str, Any]:
    """The other road to the sampled positions and to those of the reply."""
    path, chunk = folder / "reference.pt", model.chunk_tokens or 0
    engine = open_engine(make_model(folder / "model-whole", model), config=EngineConfig(kv_gib=0.1), device="cpu")
    positions = [*sampled(len(tokens), chunk), *range(len(tokens), len(tokens) + REPLY - 1)]
    found, without = reference(plain_model(engine.runner.model), [*tokens, *reply], positions, lambda text: sys.stderr.write(text + "\n"))
    torch.save({"logits": found, "without": without}, path)
    return {"logits": found, "without": without}


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
        "first chunk.",
        "",
        "| | tokens/s | seconds | CPU seconds | threads | load | of its float32 peak | memory grows by, MiB | formula | decode, ms |",
        "|---" * 10 + "|",
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
    lines += ["", *by_position(parts, tokens, chunk), ""]
    if (folder / "reference.pt").exists():
        lines += answers(parts, torch.load(folder / "reference.pt"), tokens)
    return lines


def row(part: dict[str, Any], tokens: int, model: ModelConfig, *, is_local: bool) -> str:
    """Cells of one part; what is counted as work is the multiplications and additions of attention alone."""
    steps = [step for stop, step in part["steps"].items() if stop <= tokens]
    computed = len(steps) * (model.chunk_tokens or 0)
    seconds, used = sum(step["seconds"] for step in steps), sum(step["cpu"] for step in steps)
    grown = (max(step["memory"]["peak"] for step in part["steps"].values()) - part["base"]["now"]) / 2**20
    load = statistics.mean(step["load"] for step in steps)
    chunk = model.chunk_tokens or 0
    pairs = sum(chunk * (stop - chunk / 2) for stop in part["steps"] if stop <= tokens)  # that the global layer weighs
    pairs = (0 if is_local else pairs) + 4 * computed * chunk / 2
    share = pairs * 4 * model.num_heads * model.head_width / used / part["peak_flops"]
    return f"{computed / seconds:,.0f} | {seconds:,.0f} | {used:,.0f} | {part['threads']} | {load:.1f} | {share:.0%} | {grown:.1f}"


def decoding(part: dict[str, Any], tokens: int) -> str:
    decoded = [step["seconds"] * 1e3 for stop, step in part["steps"].items() if stop > tokens]
    return f"{statistics.median(decoded):.1f}" if decoded else ""


def peak_flops() -> float:
    """float32 operations a second of one thread of torch's matrix product, the best of a few."""
    a = torch.randn(768, 768)
    best = math.inf
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
            chosen = [s["cpu"] / chunk * 1e6 for stop, s in part["steps"].items() if tokens * i // 8 < stop <= tokens * (i + 1) // 8]
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
    ((probe, without),) = other["without"].items()
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
    parser.add_argument("--save", action="store_true", help="write the table under bench/results/")
    arguments = parser.parse_args()
    folder, model = arguments.folder, model_config(arguments.chunk, arguments.heads)
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    tokens = prompt_of(arguments.tokens)
    for part in filter(None, arguments.parts.split(",")):
        if part == "reference":
            compute_reference(folder, tokens, model, progress(folder / "memory.jsonl")["reply"] or [])
            continue
        if len(arguments.parts.split(",")) > 1:  # each in a process of its own, whose memory is then its own too
            command = [sys.executable, __file__, *sys.argv[1:], "--parts", part]
            if os.spawnv(os.P_WAIT, sys.executable, [word for word in command if word != "--save"]):
                sys.exit(f"error: {part} ended early")
            continue
        compute(folder, part, tokens, model, choices(folder, part, len(tokens), model, arguments.window_mib, arguments.threads))
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
    common: dict[str, Any] = {**sizes, "draft_tokens": 0, "threads": threads}
    if part == "local":  # without global layers nothing before the last chunk has a way to the answer, and a cache would skip it
        return EngineConfig(kv_gib=4, prefix_cache=False, **common)
    common["prefix_folder"] = folder / f"{part}-prefixes"
    if part == "file":
        return EngineConfig(kv_folder=folder, kv_disk_gib=8, kv_gib=local_gib + max(local_gib, window_mib / 1024), **common)
    return EngineConfig(kv_gib=4, **common)


if __name__ == "__main__":
    main()
