"""A tensor's numbers as codes: blocks or 8-bit floats, made piece by piece when a writer or a model asks for them.

And what becomes of numbers that were codes already, of a kind that herd has no kernels for: blocks near them, at a size near theirs. Up to
5 bits a weight become int4 with a minimum, more become int8. Where the codes fit into blocks as they are and only their scales have no
exact float16, the readers keep the codes; that moves a weight by 2^-11 of itself, where rounding anew moves it by up to half a step.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from herd.checkpoint.source import Float8, Region, Stored
from herd.errors import CheckpointError
from herd.ops import fp8
from herd.ops.int4 import INT8, ROWS, Kind, dequantize
from herd.quant import fp8 as quant_fp8
from herd.quant.int4 import quantize

Measure = Callable[[str, str, Tensor, Tensor], None]  # told a tensor's name, what it becomes, a piece, and what the codes make of it

_FEW_BITS = Kind(4, 32, True)


def blocks_of(name: str, stored: Stored, kind: Kind, measure: Measure | None = None) -> Stored:
    """The blocks of a kind that a matrix, or experts, become. name: for errors and `measure`, which is told every piece once it is made."""
    step = ROWS if len(stored.shape) == 2 else 1  # rows of the matrix for one of its blocks'

    def rows(start: int, stop: int) -> Tensor:
        piece = stored.rows(start * step, stop * step).float()
        blocks = quantize(piece, kind, name=name)
        if measure is not None:
            measure(name, str(kind), piece, dequantize(blocks))
        return blocks

    return Stored(kind.blocks_shape(stored.shape), torch.uint8, rows)


def with_near(name: str, stored: Stored, bits: float) -> Stored:
    """The same tensor with blocks near its values, if its shape divides into such. bits: of one weight in the file."""
    kind = INT8 if bits > 5 else _FEW_BITS
    return dataclasses.replace(stored, near=blocks_of(name, stored, kind)) if kind.fits(stored.shape) else stored


def float8_of(name: str, stored: Stored, measure: Measure | None = None) -> Stored:
    """A matrix, or experts, as the 8-bit floats that it becomes, a scale for each row. The floats are read twice: scales come first."""

    def scale(start: int, stop: int) -> Tensor:
        return torch.cat([quant_fp8.scales(piece, name=name) for _, piece in stored.pieces(start, stop)])

    def weight(start: int, stop: int) -> Tensor:
        piece = stored.rows(start, stop).float()
        scales = quant_fp8.scales(piece, name=name)
        codes = quant_fp8.quantize(piece, scales)
        if measure is not None:
            measure(name, "float8", piece, fp8.dequantize(codes, scales))
        return codes

    return of_float8(name, Stored(stored.shape, fp8.FP8, weight), Stored((*stored.shape[:-1], 1), torch.float32, scale))


def of_float8(name: str, weight: Stored, scale: Stored) -> Stored:
    """A matrix, or experts, of which there are 8-bit floats: dequantized by rows. Reading raises `CheckpointError` for NaN and infinity."""

    def rows(start: int, stop: int) -> Tensor:
        values = fp8.dequantize(weight.rows(start, stop), scale.rows(start, stop))
        if not values.isfinite().all():
            raise CheckpointError(
                f"{name} has 8-bit floats or scales that are no finite numbers", "the checkpoint is broken; fetch it again"
            )
        return values

    stored = Stored(weight.shape, torch.float32, rows, float8=Float8(weight, scale), rounded="float8")
    return with_near(name, stored, 8)


def read_float8(name: str, weight: Region, scale: Region) -> Stored:
    """The same from two tensors of a file; the scales may be half floats. Raises `CheckpointError` for shapes that do not fit."""
    *rows, K = weight.shape
    if weight.dtype != fp8.FP8 or not scale.dtype.is_floating_point or list(scale.shape[:-1]) != rows or not rows or not scale.shape[-1]:
        what = f"{name} is {weight.dtype} {list(weight.shape)} with {scale.dtype} scales {list(scale.shape)}"
        raise CheckpointError(f"{what}, not float8 with a scale for each row", "the config does not fit the weights")
    if K % scale.shape[-1]:
        raise CheckpointError(
            f"{name} has {K} columns, which {scale.shape[-1]} scales do not divide", "the config does not fit the weights"
        )
    return of_float8(name, weight.stored(), scale.stored().to(torch.float32))


def checked_half(name: str, scale: Tensor) -> Tensor:
    """Scales as float16. Raises `CheckpointError` for those that are not finite there."""
    half = scale.half()
    if not half.isfinite().all():
        raise CheckpointError(f"{name} has scales that are not finite or too large for float16", "convert with --dtype float32")
    return half
