"""compressed-tensors: how quantized Hugging Face checkpoints of Llama 4 are laid out, read and written.

config.json has a `quantization_config`; a quantized matrix X.weight, [out, in], is several tensors, and the experts, fused elsewhere, are
a matrix each, `experts.{j}.gate_proj.weight`:

    pack-quantized    X.weight_packed [out, in / 8] int32, column v * 8 + n in bits 4 n .. 4 n + 3, code - 8 being the number
                      X.weight_scale [out, in / group], X.weight_shape [2]; value = scale * (code - 8)
    float-quantized   X.weight [out, in] float8_e4m3fn, X.weight_scale [out, 1]; value = scale * weight; inputs rounded token by token

Scales are of the model's dtype, mostly bfloat16. In int4 one below 2^-17 is rounded when it becomes float16, by 2^-25 at most, and a
float32 scale has no float16 at all: such a matrix has no blocks in herd, only its values and blocks near them. A group of more columns than
herd's becomes several of the same scale. 8-bit floats are kept as they are. They are written with float32 scales, which all readers take.
Rounding of activations is not part of a file; what herd computes with is finer. Source: compressed_tensors, compressors/pack_quantized and
naive_quantized; llm-compressor, modeling/llama4.py (the experts' names).
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from herd.checkpoint.names import FileTensor
from herd.checkpoint.rounding import checked_half, read_float8, with_near
from herd.checkpoint.source import Float8, Region, Stored
from herd.errors import CheckpointError
from herd.ops.int4 import KINDS, ROWS, Kind, pack_int4, unpack_int4

# format -> bits, type and strategies that are read
_FORMATS = {"pack-quantized": (4, "int", ("group", "channel")), "float-quantized": (8, "float", ("channel",))}
_OTHERS = ("kv_cache_scheme", "transform_config")  # keys that must be absent or empty
_READS = "herd reads compressed-tensors with one group of symmetric weights: int4 by group or row, or float8 by row"


@dataclass(frozen=True, slots=True)
class Scheme:
    """What the quantized matrices of a checkpoint are."""

    is_float: bool  # float8 with a scale per row, or codes of 4 bits
    group: int  # columns that share a scale; 0: all of a row


def read_config(config: Mapping[str, Any], where: str) -> Scheme:
    """What a `quantization_config` says. Raises `CheckpointError` for all but symmetric int4 and float8 weights."""
    method, format, groups = config.get("quant_method"), config.get("format"), config.get("config_groups")
    if method != "compressed-tensors":
        raise CheckpointError(f"{where}: quantization_config = {method!r} is not supported", _READS)
    sparsity = (config.get("sparsity_config") or {}).get("format", "dense")
    if format not in _FORMATS or sparsity != "dense" or not isinstance(groups, dict) or len(groups) != 1:
        said = f"format {format}, sparsity {sparsity}, config_groups {json.dumps(groups)}"
        raise CheckpointError(f"{where}: quantization_config with {said} is not supported", _READS)
    if others := [key for key in _OTHERS if config.get(key)]:
        raise CheckpointError(f"{where}: quantization_config with {', '.join(others)} is not supported", _READS)
    (group,) = groups.values()
    weights = group.get("weights") or {}
    bits, kind, strategies = _FORMATS[format]
    strategy = weights.get("strategy")
    size = weights.get("group_size") if strategy == "group" else 0
    is_fine = weights.get("num_bits") == bits and weights.get("type", "int") == kind and weights.get("symmetric", True)
    if not is_fine or strategy not in strategies or not isinstance(size, int) or (strategy == "group" and size < 1):
        raise CheckpointError(f"{where}: weights quantized as {json.dumps(weights)} are not supported", _READS)
    return Scheme(kind == "float", size)


def matrices(regions: Mapping[str, Region], scheme: Scheme) -> dict[str, Stored]:
    """The tensors of a file with every quantized matrix as one, under the name X.weight."""
    ends = ("weight", "weight_scale") if scheme.is_float else ("weight_packed", "weight_scale", "weight_shape")
    found, taken = {}, set()
    for name in regions:
        base, _, last = name.rpartition(".")
        names = [f"{base}.{end}" for end in ends]
        if last == ends[0] and regions.keys() >= set(names):
            weight, scale, *shape_at = (regions[part] for part in names)
            stored = _float8(name, weight, scale) if scheme.is_float else _int4(name, weight, scale, shape_at[0], scheme.group)
            found[f"{base}.weight"] = stored
            taken.update(names)
    return found | {name: region.stored() for name, region in regions.items() if name not in taken}


def _float8(name: str, weight: Region, scale: Region) -> Stored:
    if weight.dtype != torch.float8_e4m3fn or scale.shape != (weight.shape[0], 1):
        raise CheckpointError(f"{name} is {weight.dtype} with scales {list(scale.shape)}, not float8 with one for each row")
    return read_float8(name, weight, scale)


def _int4(name: str, packed: Region, scale: Region, shape_at: Region, group: int) -> Stored:
    N, K = (int(n) for n in shape_at.rows(0, 2)) if shape_at.shape == (2,) else (0, 0)
    group = group or max(1, K)
    shapes = ((N, math.ceil(K / 8)), (N, K // group))
    if packed.dtype != torch.int32 or (packed.shape, scale.shape) != shapes or K % group:
        raise CheckpointError(
            f"{name} is {packed.dtype} {list(packed.shape)} with scales {list(scale.shape)}, not int4 {[N, K]} in groups of {group}",
            "the config does not fit the weights",
        )

    def codes(start: int, stop: int) -> Tensor:
        data = packed.rows(start, stop).view(torch.uint8)
        return torch.stack((data & 15, data >> 4), -1).flatten(-2)[:, :K]

    def rows(start: int, stop: int) -> Tensor:
        numbers = torch.unflatten((codes(start, stop).to(torch.int8) - 8).float(), -1, (-1, group))
        return (numbers * scale.rows(start, stop).float()[..., None]).flatten(-2)

    kind = Kind(4, 128 if group % 128 == 0 else 32)
    if group % kind.group or not kind.fits((N, K)):
        return with_near(name, Stored((N, K), torch.float32, rows, rounded=f"int4 group {group}"), 4)

    def block_rows(start: int, stop: int) -> Tensor:
        half = checked_half(name, scale.rows(start * ROWS, stop * ROWS))
        return pack_int4(codes(start * ROWS, stop * ROWS), half.repeat_interleave(group // kind.group, -1))

    blocks = Stored(kind.blocks_shape((N, K)), torch.uint8, block_rows)
    if scale.dtype not in (torch.bfloat16, torch.float16):
        return Stored((N, K), torch.float32, rows, near=blocks, rounded=f"int4 group {group}, {_short(scale.dtype)} scales")
    return Stored((N, K), torch.float32, rows, blocks=blocks)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor of the split layout belongs."""

    herd: str
    expert: int | None  # which of herd's experts it is
    shape: tuple[int, ...]


def split(wanted: Mapping[str, FileTensor]) -> dict[str, Place]:
    """The tensors of a file in which each expert has its matrices, by their names there. wanted: those of the fused layout."""
    found = {}
    for name, t in wanted.items():
        if t.turned:  # [E, in, out], and gate and up share one
            E, D, out = t.shape
            for herd in t.herd:
                prefix, projection = name.rpartition(".")[0], herd.rpartition(".")[2]
                for i in range(E):
                    found[f"{prefix}.{i}.{projection}_proj.weight"] = Place(herd, i, (out // len(t.herd), D))
        else:
            found[name] = Place(t.herd[0], None, t.shape)
    return found


def gather(found: Mapping[str, Stored], places: Mapping[str, Place]) -> dict[str, Stored]:
    """herd's tensors from those of a file in the split layout."""
    tensors: dict[str, Stored] = {}
    experts: dict[str, list[Stored]] = {}
    for name, place in places.items():
        if place.expert is None:
            tensors[place.herd] = found[name]
        else:
            experts.setdefault(place.herd, []).append(found[name])
    return tensors | {herd: _stack(matrices) for herd, matrices in experts.items()}


def _stack(experts: list[Stored]) -> Stored:
    """One matrix of each expert as the [E, out, in] that herd has."""

    def of(parts: list[Stored]) -> Stored:
        def rows(start: int, stop: int) -> Tensor:
            return torch.stack([part.read() for part in parts[start:stop]])

        return Stored((len(parts), *parts[0].shape), parts[0].dtype, rows)

    def all_of(faces: list[Stored | None]) -> Stored | None:
        found = [face for face in faces if face is not None]
        return of(found) if len(found) == len(faces) else None

    float8 = [expert.float8 for expert in experts if expert.float8 is not None]
    return dataclasses.replace(
        of(experts),
        blocks=all_of([expert.blocks for expert in experts]),
        near=all_of([expert.near for expert in experts]),
        float8=Float8(of([f.weight for f in float8]), of([f.scale for f in float8])) if len(float8) == len(experts) else None,
        rounded=experts[0].rounded,
    )


def _expert(experts: Stored, index: int) -> Stored:
    """One expert's matrix of those that herd has in one: the other way."""

    def of(whole: Stored) -> Stored:
        return Stored(whole.shape[1:], whole.dtype, lambda a, b: whole.rows(index, index + 1)[0, a:b].contiguous())

    blocks, float8 = experts.blocks, experts.float8
    return dataclasses.replace(
        of(experts),
        blocks=of(blocks) if blocks is not None else None,
        float8=Float8(of(float8.weight), of(float8.scale)) if float8 is not None else None,
    )


# --- writing


def is_writable(stored: Stored) -> bool:
    """Whether a tensor's codes have a place in a file: int4 without minimums, and 8-bit floats with one scale for each row."""
    if stored.float8 is not None:
        return stored.float8.scale.shape[-1] == 1
    return stored.kind is not None and stored.kind.bits == 4 and not stored.kind.has_minimum


def lay_out(tensors: Mapping[str, Stored], places: Mapping[str, Place]) -> tuple[dict[str, Stored], dict[str, Any]]:
    """A model with int4 or fp8 matrices as the tensors of a file, and its `quantization_config`. The rest is written in floats."""
    written: dict[str, Stored] = {}
    ignored, schemes = [], set()
    for name, place in places.items():
        stored = tensors[place.herd] if place.expert is None else _expert(tensors[place.herd], place.expert)
        if is_writable(stored):
            if stored.float8 is not None:
                written |= {name: stored.float8.weight, name + "_scale": stored.float8.scale}
            elif stored.blocks is not None:
                written |= _parts(name, stored.blocks)
            schemes.add("float8" if stored.kind is None else f"int4 group {stored.kind.group}")
            continue
        written[name] = stored
        if len(stored.shape) == 2 and name.endswith(".weight") and "embed_tokens" not in name:
            ignored.append(name.removesuffix(".weight"))
    if len(schemes) > 1:
        raise CheckpointError(f"the model has {' and '.join(sorted(schemes))}; a Hugging Face file has one of them", "quantize it anew")
    (said,) = schemes
    is_float = said == "float8"
    weights: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
    inputs = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
    if not is_float:
        weights = {
            "num_bits": 4,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": int(said.split()[-1]),
            "dynamic": False,
        }
    scheme = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs if is_float else None,
        "output_activations": None,
    }
    return written, {
        "quant_method": "compressed-tensors",
        "format": "float-quantized" if is_float else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": ignored,
        "kv_cache_scheme": None,
    }


def _parts(name: str, blocks: Stored) -> dict[str, Stored]:
    """int4 blocks without minimums as the tensors of a file. name: X.weight."""
    kind = KINDS[blocks.shape[-1]]
    N, K = kind.matrix_shape(blocks.shape)

    def unpacked(start: int, stop: int) -> tuple[Tensor, Tensor]:
        first = start // ROWS
        codes, scale, _ = unpack_int4(blocks.rows(first, -(-stop // ROWS)))
        return codes[start - first * ROWS : stop - first * ROWS], scale[start - first * ROWS : stop - first * ROWS]

    def packed(start: int, stop: int) -> Tensor:
        low, high = torch.unflatten(unpacked(start, stop)[0], -1, (-1, 2)).unbind(-1)
        return (low | high << 4).view(torch.int32)

    base = name.removesuffix(".weight")
    return {
        f"{base}.weight_packed": Stored((N, K // 8), torch.int32, packed),
        f"{base}.weight_scale": Stored((N, K // kind.group), torch.float16, lambda a, b: unpacked(a, b)[1].contiguous()),
        f"{base}.weight_shape": Stored((2,), torch.int64, lambda a, b: torch.tensor([N, K])[a:b]),
    }
