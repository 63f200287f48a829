"""Meta's own fp8 and int4 files: which tensors of the shards are codes, where their scales are, and what they mean.

`llama4/scripts/quantize.py` of llama_models writes them. params.json says nothing of it; beside consolidated.{rank}.pth there is

    fp8_mixed    fp8_scales_{rank}.pt    float32 [E, out]              codes float8_e4m3fn, laid out as the floats are
    int4_mixed   int4_scales_{rank}.pt   float32 [E, in / 128, out]    two codes a byte along `in`, dtype said to be float8_e4m3fn

with rank 0, 1 ... without leading zeros, and keys by role, `layers.{i}.feed_forward.experts.w1` (gate; w3 up, w2 down). What has a key is
quantized: the routed experts, but for those of the model's first and last layer. In int4 their loader looks for shared experts as well,
[out, in / 2] with scales [in / 128, out]; the script writes none, herd reads them. The even column of a pair is the low nibble, a signed
number of -8..7; value = scale * number.

Every shard was quantized by itself. The down matrix is cut along its columns, so in fp8 each of its rows has a scale for every shard.

An int4 scale is the largest magnitude of 128 bfloat16 weights, at least 1e-6, / 8: float16 holds it exactly from 2^-17 up and rounds it by
2^-25 at most below, as it does those of compressed-tensors. One that is no bfloat16 number is rounded by 2^-11 of itself or by 2^-25, and a
warning says so. The codes are kept in any case, and as floats the values are exact.

Their loader (llama_models 0.3.0) takes its fp8 files and cannot take its int4 files: packed codes do not fit its parameters, and it would
turn the bytes into the values of float8 numbers. Here the writer is followed.
Source: llama_models, llama4/scripts/quantize.py, llama4/quantization/loader.py, quantize_impls.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from herd.checkpoint.meta_shards import Part, regions_of, stored_of
from herd.checkpoint.names import FileTensor, check_tensors
from herd.checkpoint.rounding import checked_half, of_float8, with_near
from herd.checkpoint.source import Region, Stored
from herd.errors import CheckpointError
from herd.log import log
from herd.ops.fp8 import FP8
from herd.ops.int4 import ROWS, Kind, pack_int4

_KIND = Kind(4, 128)
_SMALLEST_EXACT = 2.0**-17
_ROLES = {
    "experts.moe_w_in_eD_F": "experts.w1",
    "experts.moe_w_swiglu_eD_F": "experts.w3",
    "experts.moe_w_out_eF_D": "experts.w2",
    "w_in_shared_FD.weight": "shared_expert.w1",
    "w_swiglu_FD.weight": "shared_expert.w3",
    "w_out_shared_DF.weight": "shared_expert.w2",
}
_AGAIN = "the files are not of one checkpoint; fetch all of them again"


def check_args(args: Mapping[str, Any], where: str) -> None:
    """Raise `CheckpointError` for `quantization_args` of params.json that say another thing than the files of scales do."""
    other = {key: value for key, value in args.items() if value and not (key == "group_size" and value == _KIND.group)}
    if other:
        said = ", ".join(f"{key} {value}" for key, value in other.items())
        raise CheckpointError(
            f"{where}: quantization_args with {said} is not supported", "herd reads Meta's fp8_mixed and int4_mixed, in groups of 128"
        )


def role_of(name: str) -> str | None:
    """The key of a tensor's scales, None for a tensor that is never quantized."""
    prefix, found, rest = name.partition(".feed_forward.")
    return f"{prefix}{found}{_ROLES[rest]}" if rest in _ROLES else None


@dataclass(frozen=True, slots=True)
class Scales:
    """The scales of all shards, of a plain checkpoint none, and what they make of the tensors."""

    bits: int  # 8: fp8_mixed, 4: int4_mixed
    shards: list[dict[str, Region]]  # key -> place, for every rank
    warn: Callable[..., None]  # says a thing once

    def key(self, name: str) -> str | None:
        """The key of a tensor's scales, None where it has none."""
        role = role_of(name)
        if role is None or (self.bits == 8 and "shared" in role):
            return None
        return role if role in self.shards[0] else None

    def local_shape(self, name: str, shape: tuple[int, ...], turned: bool) -> tuple[int, ...]:
        """A tensor's shape in a shard, from that of its floats: int4 packs along `in`, dim 0 of flat experts and else the last."""
        if self.bits == 8 or self.key(name) is None:
            return shape
        return (shape[0] // 2, *shape[1:]) if turned else (*shape[:-1], shape[-1] // 2)

    def stored(self, name: str, part: Part, shards: list[Region]) -> Stored:
        """A tensor as herd's. shards: its place in every one. Raises `CheckpointError` for codes without scales and the reverse."""
        key = self.key(name)
        for region in shards:
            if (region.dtype == FP8) != (key is not None):
                has = "has no scales beside it" if key is None else f"has scales, {key}"
                raise CheckpointError(f"{region.path}: {name} is {region.dtype} and {has}", "codes (float8_e4m3fn) have scales; " + _AGAIN)
        if key is None:
            return stored_of(part, shards)
        where = f"{shards[0].path.parent}: {key}"
        data = [replace(region, dtype=torch.uint8) for region in shards]
        scales = [regions[key] for regions in self.shards]
        return _fp8(where, part, data, scales) if self.bits == 8 else _int4(where, part, data, scales, self.warn)


def find_scales(folder: Path, num_shards: int, wanted: Mapping[str, FileTensor], shapes: Mapping[str, tuple[int, ...]]) -> Scales:
    """The scales of a folder. wanted, shapes: the model's tensors by Meta's names, and shapes by herd's. Raises `CheckpointError`."""
    found = {bits: sorted(path.name for path in folder.glob(f"{kind}_scales_*.pt")) for kind, bits in (("fp8", 8), ("int4", 4))}
    if found[4] and found[8]:
        raise CheckpointError(f"{folder} has scales of int4 and of fp8: {found[4][0]}, {found[8][0]}", "keep those of the weights")
    bits = 4 if found[4] else 8
    warn = cache(log.warning)
    if not found[bits]:
        return Scales(bits, [{}] * num_shards, warn)
    expected = [f"{'fp8' if bits == 8 else 'int4'}_scales_{rank}.pt" for rank in range(num_shards)]
    if found[bits] != sorted(expected):
        lacks = sorted(set(expected) - set(found[bits])) or [f"shards for {name}" for name in sorted(set(found[bits]) - set(expected))]
        raise CheckpointError(f"{folder} has {num_shards} shards and lacks {', '.join(lacks)}", "fetch them")
    paths = [folder / name for name in expected]
    scales = Scales(bits, [regions_of(path) for path in paths], warn)
    named = {key: t for name, t in wanted.items() if (key := scales.key(name))}
    for path, regions in zip(paths, scales.shards, strict=True):
        check_tensors(
            {key: region.shape for key, region in regions.items()},
            {key: _scales_shape(f"{path}: {key}", bits, shapes[t.herd[0]], t.split, num_shards) for key, t in named.items()},
            str(path),
        )
        for key, region in regions.items():
            if region.dtype != torch.float32:
                raise CheckpointError(f"{path}: {key} is {region.dtype}, not float32", _AGAIN)
    return scales


def _scales_shape(where: str, bits: int, shape: tuple[int, ...], split: int | None, num_shards: int) -> tuple[int, ...]:
    """Of one shard's scales for herd's [E, out, in] or [out, in]."""
    *E, N, K = (n // num_shards if dim == split else n for dim, n in enumerate(shape))
    if bits == 4 and K % _KIND.group:
        raise CheckpointError(f"{where} is for {K} columns in each of {num_shards} shards, no whole groups of {_KIND.group}", _AGAIN)
    return (*E, N) if bits == 8 else (*E, K // _KIND.group, N)


def _fp8(where: str, part: Part, data: list[Region], scales: list[Region]) -> Stored:
    E, N, _ = part.shape
    is_down = part.split == 2

    def rows(start: int, stop: int) -> Tensor:
        pieces = [region.rows(start, stop) for region in scales]  # [experts, out] of every shard
        return torch.stack(pieces, -1) if is_down else torch.cat(pieces, -1)[..., None]

    weight = Stored(part.shape, FP8, lambda a, b: part.read(data, a, b).view(FP8))
    return of_float8(where, weight, Stored((E, N, len(data) if is_down else 1), torch.float32, rows))


def _int4(where: str, part: Part, data: list[Region], scales: list[Region], warn: Callable[..., None]) -> Stored:
    (*E, N, K), split = part.shape, part.split
    assert split is not None
    packed = replace(part, shape=(*E, N, K // 2))
    step = 1 if E else ROWS  # rows of the matrix for one of its blocks'

    def codes(start: int, stop: int) -> Tensor:
        pairs = packed.read(data, start, stop)
        return torch.stack((pairs & 15, pairs >> 4), -1).flatten(-2) ^ 8  # -8..7 -> 0..15

    def scale(start: int, stop: int) -> Tensor:
        if E:
            return torch.cat([region.rows(start, stop).transpose(1, 2) for region in scales], split)  # [experts, out, in / 128]
        return torch.cat([region.rows(0, region.shape[0]).T for region in scales], split)[start:stop]

    def rows(start: int, stop: int) -> Tensor:
        numbers = torch.unflatten((codes(start, stop).to(torch.int8) - 8).float(), -1, (-1, _KIND.group))
        return (numbers * scale(start, stop)[..., None]).flatten(-2)

    def blocks(start: int, stop: int) -> Tensor:
        exact = scale(start * step, stop * step)
        half = checked_half(where, exact)
        if ((half.float() != exact) & (exact.abs() >= _SMALLEST_EXACT)).any():
            warn(
                "%s has int4 scales that float16 does not hold: they are rounded, by 2^-11 of themselves or 2^-25",
                where.rpartition(": ")[0],
            )
        return pack_int4(codes(start * step, stop * step), half)

    if not _KIND.fits(part.shape):
        return with_near(where, Stored(part.shape, torch.float32, rows, rounded=f"int4 group {_KIND.group}"), 4)
    return Stored(part.shape, torch.float32, rows, blocks=Stored(_KIND.blocks_shape(part.shape), torch.uint8, blocks))
