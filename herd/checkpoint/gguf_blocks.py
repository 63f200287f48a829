"""GGUF's blocks of 32 and herd's hold the same numbers in another order: Q4_0, Q4_1 and Q8_0, read and written without a change.

GGUF has a row's blocks one after the other: [scale, float16] [minimum, float16: Q4_1 only] [codes]. In Q4 the low nibbles of the 16 bytes
are columns 0 to 15, the high ones 16 to 31. Source: ggml-common.h and ggml-quants.c of llama.cpp.
"""

import torch
from gguf.constants import GGMLQuantizationType as Type
from torch import Tensor

from herd.checkpoint.source import Region, Stored
from herd.errors import CheckpointError
from herd.ops.int4 import INT8, KINDS, ROWS, Kind, pack_int4, pack_int8, unpack_int4, unpack_int8

_KINDS = {Type.Q4_0: Kind(4, 32), Type.Q4_1: Kind(4, 32, True), Type.Q8_0: INT8}
_TYPES = {(kind.bits, kind.has_minimum): type for type, kind in _KINDS.items()}


def read(region: Region, type: Type, shape: tuple[int, ...], name: str) -> Stored | None:
    """The herd blocks of a tensor of a GGUF file; None where herd has none of its type or shape. region: its bytes, [.., N, bytes]."""
    kind = _KINDS.get(type)
    if kind is None or not kind.fits(shape):
        return None

    def rows(start: int, stop: int) -> Tensor:
        step = ROWS if len(shape) == 2 else 1  # of the region's rows, for one of the blocks'
        return _to_herd(region.rows(start * step, stop * step), kind, name)

    return Stored(kind.blocks_shape(shape), torch.uint8, rows)


def _to_herd(data: Tensor, kind: Kind, name: str) -> Tensor:
    head = 4 if kind.has_minimum else 2  # bytes of scale and minimum
    blocks = torch.unflatten(data, -1, (-1, head + kind.group * kind.bits // 8))  # [.., N, K / 32, bytes]
    codes = blocks[..., head:]
    numbers = blocks[..., :head].contiguous().view(torch.float16)
    if kind.bits == 8:
        codes = codes.contiguous().view(torch.int8).flatten(-2)
        if codes.min() == -128:
            raise CheckpointError(f"{name} has the 8-bit code -128, which no quantizer of llama.cpp writes", "convert with --dtype float32")
        return pack_int8(codes, numbers[..., 0])
    codes = torch.cat((codes & 15, codes >> 4), -1).flatten(-2)
    return pack_int4(codes, numbers[..., 0], numbers[..., 1] if kind.has_minimum else None)


def write(blocks: Stored) -> tuple[Stored, Type]:
    """herd's blocks as a tensor of a GGUF file, [.., N, bytes], and its type. A group of 128 becomes four blocks of the same scale."""
    kind = KINDS[blocks.shape[-1]]
    *E, N, K = kind.matrix_shape(blocks.shape)
    type = _TYPES[kind.bits, kind.has_minimum]
    shape = (*E, N, K // 32 * ((4 if kind.has_minimum else 2) + 4 * kind.bits))

    def rows(start: int, stop: int) -> Tensor:
        if E:
            return _to_gguf(blocks.rows(start, stop), kind)
        first = start // ROWS
        return _to_gguf(blocks.rows(first, -(-stop // ROWS)), kind)[start - first * ROWS : stop - first * ROWS]

    return Stored(shape, torch.uint8, rows), type


def _to_gguf(blocks: Tensor, kind: Kind) -> Tensor:
    minimum: Tensor | None = None
    if kind.bits == 8:
        codes, scale = unpack_int8(blocks)
        lain = torch.unflatten(codes.view(torch.uint8), -1, (-1, 32))
    else:
        codes, scale, minimum = unpack_int4(blocks)
        low, high = torch.unflatten(codes, -1, (-1, 2, 16)).unbind(-2)
        lain = low | high << 4
    numbers = [scale] if minimum is None else [scale, minimum]
    heads = [half.repeat_interleave(kind.group // 32, -1).unsqueeze(-1).view(torch.uint8) for half in numbers]
    return torch.cat([*heads, lain], -1).flatten(-2)
