"""GGUF's blocks of 32 and herd's hold the same numbers in another order: Q4_0, Q4_1 and Q8_0, read and written without a change.

GGUF has a row's blocks one after the other: [scale, float16] [minimum, float16: Q4_1 only] [codes]. In Q4 the low nibbles of the 16 bytes
are columns 0 to 15, the high ones 16 to 31.

Q4_K, the usual one, has the codes of Q4_1: 256 columns are 8 groups of 32, and the scale of a group is a float16 times 6 bits, as is what
is subtracted. Their products have 17 bits and float16 has 11, so here herd's blocks have the same codes and hold nearly the same numbers.
Source: ggml-common.h and ggml-quants.c of llama.cpp.
"""

import torch
from gguf.constants import GGMLQuantizationType as Type
from torch import Tensor

from herd.checkpoint.rounding import checked_half
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


def read_near(region: Region, type: Type, shape: tuple[int, ...], name: str) -> Stored | None:
    """The herd blocks with the codes of a tensor whose scales have no exact float16: of Q4_K. None for other types. Arguments as above."""
    kind = Kind(4, 32, True)
    if type != Type.Q4_K or not kind.fits(shape):
        return None

    def rows(start: int, stop: int) -> Tensor:
        step = ROWS if len(shape) == 2 else 1
        return _q4k_to_herd(region.rows(start * step, stop * step), name)

    return Stored(kind.blocks_shape(shape), torch.uint8, rows)


def _q4k_to_herd(data: Tensor, name: str) -> Tensor:
    blocks = torch.unflatten(data, -1, (-1, 144))  # 2 float16, 12 bytes of scales and minimums, 128 of codes
    factors = blocks[..., :4].contiguous().view(torch.float16).float()  # [.., K / 256, 2]
    a, b, c = torch.unflatten(blocks[..., 4:16], -1, (3, 4)).unbind(
        -2
    )  # groups 0 to 3 are the low 6 bits of a and b; c and the rest 4 to 7
    scale = torch.cat((a & 63, c & 15 | a >> 2 & 48), -1).float() * factors[..., :1]
    minimum = torch.cat((b & 63, c >> 4 | b >> 2 & 48), -1).float() * -factors[..., 1:]
    codes = torch.unflatten(blocks[..., 16:], -1, (4, 32))  # 4 pairs of groups, low nibbles and high ones
    codes = torch.stack((codes & 15, codes >> 4), -2).flatten(-4)
    return pack_int4(codes, checked_half(name, scale.flatten(-2)), checked_half(name, minimum.flatten(-2)))


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
