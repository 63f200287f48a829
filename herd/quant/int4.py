"""Rounding to the nearest 4-bit or 8-bit code, and which matrices of a model get which.

Where the 16 codes lie decides the error. For Gaussian weights in groups of 32, rms error over rms weight (128 in brackets):

    the number of largest magnitude becomes code -8, as in GGUF's Q4_0     0.0859 (0.1032)   used here
    largest magnitude / 8, +8 cut to 7, as in Meta's int4                  0.0937 (0.1056)
    largest magnitude / 7.5, as in compressed-tensors                      0.0948 (0.1108)
    largest magnitude / 7                                                  0.0970 (0.1173)
    with a minimum, (largest - smallest) / 15                              0.0782 (0.0998)   on request

`tests/quant/test_int4.py` measures them. So a scale is negative where the number of largest magnitude is positive; every reader
multiplies. Scales and minimums are rounded to float16 before codes are chosen, so that the codes make up for that rounding.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from herd.errors import CheckpointError
from herd.ops.int4 import INT8, Kind, pack_int4, pack_int8

# Matrices by the part of the model that they belong to, in the order of a report. What is in none stays as it is: router, norms, vision,
# projector. Source: the published int4 recipes for Llama 4 leave those in full; embedding and head get 8 bits.
_PARTS = {
    "embedding": r"embed\.weight",
    "attention": r"layers\.\d+\.attention\.[qkvo]\.weight",
    "dense": r"layers\.\d+\.ffn\.(gate|up|down)\.weight",
    "shared": r"layers\.\d+\.ffn\.shared\.(gate|up|down)\.weight",
    "experts": r"layers\.\d+\.ffn\.experts\.(gate|up|down)",
    "head": r"head\.weight",
}
PARTS = tuple(_PARTS)


def part_of(name: str) -> str | None:
    """The part of the model that a tensor belongs to, None for those that are never quantized."""
    return next((part for part, pattern in _PARTS.items() if re.fullmatch(pattern, name)), None)


@dataclass(frozen=True, slots=True)
class Plan:
    """What becomes of the tensors of a model."""

    kinds: Mapping[str, Kind]  # of the tensors to quantize
    unfit: tuple[str, ...]  # would be, but their shape is no whole number of blocks


def plan(shapes: Mapping[str, tuple[int, ...]], group: int = 32, with_minimum: bool = False) -> Plan:
    """Matrices of the layers to int4, embedding and head to int8. shapes: of all tensors, by herd's names."""
    kinds, unfit = {}, []
    for name, shape in shapes.items():
        part = part_of(name)
        if part is not None:
            kind = INT8 if part in ("embedding", "head") else Kind(4, group, with_minimum)
            if kind.fits(shape):
                kinds[name] = kind
            else:
                unfit.append(name)
    return Plan(kinds, tuple(unfit))


def quantize(weight: Tensor, kind: Kind, *, name: str = "the matrix") -> Tensor:
    """A matrix [.., N, K] of floats as blocks of a kind. Raises `CheckpointError` for what is not finite; name: of the tensor, for that."""
    if kind.bits == 8:
        return quantize_int8(weight, name=name)
    return quantize_int4(weight, kind.group, kind.has_minimum, name=name)


def quantize_int4(weight: Tensor, group: int = 32, with_minimum: bool = False, *, name: str = "the matrix") -> Tensor:
    """A matrix [.., N, K] of floats as int4 blocks."""
    groups = torch.unflatten(weight.float(), -1, (-1, group))
    minimum: Tensor | None = None
    if with_minimum:
        minimum = _half(groups.amin(-1), name)
        groups = groups - minimum.float()[..., None]
        scale = _half(groups.amax(-1) / 15, name)
        zero = 0
    else:
        extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)  # with its sign
        scale = _half(extreme / -8, name)
        zero = 8
    codes = _codes(groups, scale).add_(zero).clamp_(0, 15).to(torch.uint8).flatten(-2)
    return pack_int4(codes, scale, minimum)


def quantize_int8(weight: Tensor, *, name: str = "the matrix") -> Tensor:
    """A matrix [.., N, K] of floats as int8 blocks: largest magnitude / 127 in each group of 32."""
    groups = torch.unflatten(weight.float(), -1, (-1, INT8.group))
    scale = _half(groups.abs().amax(-1) / 127, name)
    return pack_int8(_codes(groups, scale).clamp_(-127, 127).to(torch.int8).flatten(-2), scale)


def _codes(groups: Tensor, scale: Tensor) -> Tensor:
    """groups / scale to the nearest integer; 0 where the scale is 0, which a group of (nearly) nothing has."""
    full = scale.float()[..., None]
    return torch.where(full == 0, 0, groups / full).round_()


def _half(numbers: Tensor, name: str) -> Tensor:
    """Scales or minimums in float16. All of a group goes into its own, so one look here finds every NaN and infinity of the weights."""
    half = numbers.half()
    if not half.isfinite().all():
        what = "holds NaN or infinity" if not numbers.isfinite().all() else "holds weights too large for a float16 scale"
        raise CheckpointError(f"{name} {what}", "the checkpoint is broken; weights of a trained model are small")
    return half
