"""What a model is made of, what it needs, and whether that fits here. Reads configs only: no weights, no download."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from tyro.conf import FlagCreatePairsOff, Positional, arg

from herd.checkpoint.load import open_source
from herd.checkpoint.store import resolve
from herd.model.config import ModelConfig
from herd.model.presets import PRESETS
from herd.model.size import KV_KINDS, WEIGHT_KINDS, kv_bytes, parameters, weight_bytes
from herd.ops.pick import OPS, TABLE, Way, ways

CONTEXTS = {"8K": 8192, "128K": 131_072, "1M": 1_048_576, "10M": 10_485_760}
NOTES = {"behemoth": "Meta published 288B active, 16 experts and nearly 2T in all, and no dimension: this geometry is herd's own."}


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Memory is for one sequence; KV is the keys and values of its tokens."""

    model: Annotated[Positional[str], arg(metavar="[MODEL]")] = "cria"  # a path to a checkpoint or a name
    ops: FlagCreatePairsOff[bool] = False  # instead, which implementation of each op serves which device, and which ones run here


def run(options: Options) -> int:
    if options.ops:
        print("\n".join(ops_report()))
        return 0
    config = PRESETS[options.model] if options.model in PRESETS else open_source(resolve(options.model)).config
    print("\n".join(report(options.model, config, *memory())))
    return 0


def report(name: str, config: ModelConfig, available: int, where: str) -> list[str]:
    """The lines that `herd inspect` prints. available: bytes of memory, where: what to call it."""
    size = parameters(config)
    gib = 2**30
    lines = [f"{name}: {describe(config)}", *([NOTES[name]] if name in NOTES else []), ""]
    lines += [
        f"parameters  text {size.text:,}   vision {size.vision:,}   total {size.total:,}",
        f"            active per token {size.active:,} of the text model",
        "",
        f"memory in GiB   {'':10}" + "".join(f"{kind:>20}" for kind in WEIGHT_KINDS),
        f"weights         {'':10}" + "".join(f"{weight_bytes(size, kind) / gib:20,.1f}" for kind in WEIGHT_KINDS),
        "",
        f"                {'':10}" + "".join(f"{kind:>20}" for kind in KV_KINDS),
    ]
    for label, tokens in CONTEXTS.items():
        cells = []
        for kind in KV_KINDS:
            kv = kv_bytes(config, tokens, kind)
            beside = next((weights for weights in WEIGHT_KINDS if weight_bytes(size, weights) + kv <= available), "no fit")
            cells.append(f"{kv / gib:9,.2f}, {beside:>6}".rjust(20))
        past = "" if tokens <= config.context_tokens else f"   past its context of {config.context_tokens:,}"
        lines.append(f"KV at {label:<5}     {tokens:>10,}" + "".join(cells) + past)
    lines += ["", f"Behind KV: the widest weights that it fits beside, within {available / gib:.1f} GiB of {where}."]
    lines += ["int4 weights stay int4. On a CPU fp8 ones become int8 (8.5 bits), others are fp32; on a GPU they are bf16."]
    lines += ["--kv says what KV is; without it 16 bits, or fp32 where weights are. --kv-folder keeps that of global layers in a file."]
    return lines


def describe(config: ModelConfig) -> str:
    """One line on the architecture."""
    local = (
        f"{len(config.local_layers)} local (chunk {config.chunk_tokens:,})" if config.chunk_tokens else "all with RoPE and full attention"
    )
    layers = f"{config.num_layers} layers: {local}"
    if config.chunk_tokens:
        layers += f", {len(config.global_layers)} global"
    moe = [layer for layer in range(config.num_layers) if config.is_moe(layer)]
    ffn = f"{config.num_experts} experts in {len(moe)} layers, {config.experts_per_token} per token and a shared one" if moe else "dense"
    heads = f"{config.num_heads} heads, {config.num_kv_heads} for keys and values, {config.head_width} wide"
    sees = "text and images" if config.vision else "text only"
    return f"{layers}; {ffn}; width {config.width:,}; {heads}; vocabulary {config.vocab_size:,}; {sees}"


def memory() -> tuple[int, str]:
    """Bytes that a model could take here, and where: the GPUs if there are any, else what the system says is available."""
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        return sum(torch.cuda.mem_get_info(i)[0] for i in range(count)), f"free memory on {count} GPU{'s' if count > 1 else ''}"
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():  # Linux: free, or held by caches that give way
        kib = next(line.split()[1] for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
        return int(kib) * 1024, "available memory"
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "memory"


def ops_report() -> list[str]:
    """The table of `herd/ops/pick.py` as it is for this machine's best device, in the dtype that models have there."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    rows = [("", "way", "device", "dtype", "file", "here")]
    for way in TABLE:
        mark = "*" if way in _reachable(ways(way.op, device, dtype)) else ""
        dtypes = " ".join(map(_short, way.dtypes)) or "any"
        rows.append((mark, way.name, " ".join(way.devices) or "any", dtypes, way.home, _here(way, device, dtype)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    header, *lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    report = [f"torch {torch.__version__} on {name}, {_short(dtype)}; * marks what runs here, tried from the top", "", header]
    for op, what in OPS.items():
        report += ["", f"{op}: {what}", *(line for line, way in zip(lines, TABLE, strict=True) if way.op == op)]
    return report


def _reachable(found: tuple[Way, ...]) -> tuple[Way, ...]:
    """Those that some call takes: up to the first that takes every call."""
    last = next(i for i, way in enumerate(found) if not way.only)
    return found[: last + 1]


def _here(way: Way, device: str, dtype: torch.dtype) -> str:
    """What the machine has or lacks for it, and which calls it takes."""
    able, words = way.needs() if way.needs else (True, "")
    if way.devices and device not in way.devices:
        return "" if able else words
    unfit = f"not for {_short(dtype)}" if way.dtypes and dtype not in way.dtypes else ""
    return "; ".join(filter(None, (unfit, words, f"only {way.only}" if way.only else "")))


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
