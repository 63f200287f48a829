"""Matrices of 4-bit and 8-bit codes: how the blocks lie in memory, what they mean, and the product with them, plain.

A matrix [N, K] is cut into blocks of 8 rows by one group of g columns; a block holds its codes, then one float16 scale for each row,
then, if the kind has them, one float16 minimum for each row:

    int4   value = scale * code + minimum, code 0..15; without minimums, minimum = -8 * scale        g is 32 or 128
    int8   value = scale * code, code -127..127                                                      g is 32

So GGUF's Q4_0, Q4_1 and Q8_0 come in with codes, scales and minimums unchanged. Eight rows lie together because one load of 32 bytes
then feeds eight sums at once. The codes of a block are vectors of 32 bytes, byte r * 4 + j of vector v being

    int4   low nibble: row r, column v * 8 + j; high nibble: row r, column v * 8 + 4 + j
    int8   row r, column v * 4 + j

A matrix is one uint8 tensor [N / 8, K / g, B], experts are [E, N / 8, K / g, B], and B alone tells the kind.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 8  # rows of one block
ACTIVATION_GROUP = 32  # columns of the input that share a scale
LARGEST = {8: 127, 16: 254 * 127 + 126}  # code of the largest activation; 16 bits are two 8-bit codes, 254 * high + low


@dataclass(frozen=True, slots=True)
class Kind:
    """One way to write a block."""

    bits: int
    group: int  # columns of one block, which share a scale in each row
    has_minimum: bool = False

    @property
    def code_bytes(self) -> int:
        return ROWS * self.group * self.bits // 8

    @property
    def block_bytes(self) -> int:
        return self.code_bytes + ROWS * 2 * (2 if self.has_minimum else 1)

    def __str__(self) -> str:
        return f"int{self.bits} group {self.group}" + (" minimum" if self.has_minimum else "")

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a matrix [.., N, K] is a whole number of such blocks."""
        return len(shape) >= 2 and shape[-2] % ROWS == 0 and shape[-1] % self.group == 0

    def blocks_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """[.., N, K] -> [.., N / 8, K / g, B]."""
        *E, N, K = shape
        return (*E, N // ROWS, K // self.group, self.block_bytes)

    def matrix_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """[.., N / 8, K / g, B] -> [.., N, K]."""
        *E, strips, groups, _ = shape
        return (*E, strips * ROWS, groups * self.group)


INT8 = Kind(8, 32)
KINDS = {kind.block_bytes: kind for kind in (Kind(4, 32), Kind(4, 32, True), Kind(4, 128), Kind(4, 128, True), INT8)}


def kind_of(blocks: Tensor) -> Kind:
    """The kind of a tensor of blocks."""
    assert blocks.dtype == torch.uint8 and blocks.shape[-1] in KINDS, f"no blocks: {blocks.dtype} {list(blocks.shape)}"
    return KINDS[blocks.shape[-1]]


def pack_int4(codes: Tensor, scale: Tensor, minimum: Tensor | None = None) -> Tensor:
    """codes [.., N, K] uint8 of 0..15, scale and minimum [.., N, K / g] float16 -> blocks."""
    *E, N, K = codes.shape
    groups = scale.shape[-1]
    low, high = codes.reshape(*E, N // ROWS, ROWS, groups, K // groups // 8, 2, 4).unbind(-2)
    packed = low | high << 4  # [.., N / 8, 8, K / g, g / 8, 4]
    return _joined(packed, scale, minimum)


def pack_int8(codes: Tensor, scale: Tensor) -> Tensor:
    """codes [.., N, K] int8 of -127..127, scale [.., N, K / 32] float16 -> blocks."""
    *E, N, K = codes.shape
    groups = scale.shape[-1]
    return _joined(codes.view(torch.uint8).reshape(*E, N // ROWS, ROWS, groups, K // groups // 4, 4), scale, None)


def _joined(packed: Tensor, scale: Tensor, minimum: Tensor | None) -> Tensor:
    """Codes [.., N / 8, 8, K / g, v, 4], scales and minimums as blocks."""
    parts = [packed.movedim(-4, -2).flatten(-3)]  # [.., N / 8, K / g, v * 8 * 4]
    for numbers in (scale, minimum):
        if numbers is not None:
            assert numbers.dtype == torch.float16
            parts.append(torch.unflatten(numbers, -2, (-1, ROWS)).transpose(-1, -2).contiguous().view(torch.uint8))
    return torch.cat(parts, -1)


def unpack_int4(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Blocks -> codes [.., N, K] uint8, scale [.., N, K / g] float16, minimum the same or None: the inverse of `pack_int4`."""
    kind = kind_of(blocks)
    assert kind.bits == 4
    packed, scale, minimum = _parted(blocks, kind)  # [.., N / 8, 8, K / g, v, 4]
    codes = torch.stack((packed & 15, packed >> 4), -2)  # [.., v, 2, 4]
    return codes.reshape(kind.matrix_shape(blocks.shape)), scale, minimum


def unpack_int8(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks -> codes [.., N, K] int8, scale [.., N, K / 32] float16: the inverse of `pack_int8`."""
    kind = kind_of(blocks)
    assert kind.bits == 8
    packed, scale, _ = _parted(blocks, kind)
    return packed.reshape(kind.matrix_shape(blocks.shape)).view(torch.int8), scale


def _parted(blocks: Tensor, kind: Kind) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inverse of `_joined`."""
    codes, numbers = blocks[..., : kind.code_bytes], blocks[..., kind.code_bytes :]
    packed = torch.unflatten(codes, -1, (-1, ROWS, 4)).movedim(-2, -4)
    halves = torch.unflatten(numbers.contiguous().view(torch.float16), -1, (-1, ROWS)).movedim(-2, 0)  # [1 or 2, .., N / 8, K / g, 8]
    scale, *minimum = (half.transpose(-1, -2).flatten(-3, -2) for half in halves)
    return packed, scale, minimum[0] if minimum else None


def dequantize(blocks: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix [.., N, K] that blocks stand for. In float32 codes without minimums are exact, those with are rounded once."""
    kind = kind_of(blocks)
    minimum: Tensor | None = None
    if kind.bits == 8:
        codes, scale = unpack_int8(blocks)
    else:
        codes, scale, minimum = unpack_int4(blocks)
        codes = codes if kind.has_minimum else codes.to(torch.int8) - 8
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    values = torch.unflatten(codes.to(exact), -1, (-1, kind.group))
    values *= scale.to(exact)[..., None]
    if minimum is not None:
        values += minimum.to(exact)[..., None]
    return values.flatten(-2).to(dtype)


def round_activations(x: Tensor, bits: int = 16) -> tuple[Tensor, Tensor]:
    """x [T, K] -> codes [T, K] int16 and scale [T, K / 32] float32: largest magnitude / 127 or 32,384 of every 32 columns.

    With eight bits a product costs half the arithmetic; in a small model their rounding moves logits more than its weights can bear.

    Where 1 / scale is not finite (all zeros, or next to nothing) the codes are 0.
    """
    groups = torch.unflatten(x.float(), -1, (-1, ACTIVATION_GROUP))
    scale = groups.abs().amax(-1) / LARGEST[bits]
    inverse = 1 / scale
    inverse = torch.where(inverse.isfinite(), inverse, 0)
    return (groups * inverse[..., None]).round().to(torch.int16).flatten(-2), scale


def blocks_linear_plain(x: Tensor, blocks: Tensor, bits: int = 16) -> Tensor:
    """The definition: x [T, K], rounded to 8 or 16 bits, times the transpose of blocks [N / 8, K / g, B] -> [T, N] float32.

    In exact integers this is, for every 32 columns, scale_w * scale_x * (codes of w . codes of x) + minimum * scale_x * sum(codes of x).
    Here everything is float64, where that sum and the product of the two dequantized matrices are the same.
    """
    codes, scale = round_activations(x, bits)
    rounded = torch.unflatten(codes.double(), -1, (-1, ACTIVATION_GROUP)) * scale.double()[..., None]
    return (rounded.flatten(-2) @ dequantize(blocks, torch.float64).T).float()
