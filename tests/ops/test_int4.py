"""Blocks of 4-bit and 8-bit codes, against the layout spelled out byte by byte, the `gguf` package, and a loop over integers."""

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as Type
from torch import Tensor

from herd.ops.int4 import (
    INT8,
    KINDS,
    LARGEST,
    Kind,
    blocks_linear_plain,
    dequantize,
    kind_of,
    pack_int4,
    pack_int8,
    round_activations,
    unpack_int4,
    unpack_int8,
)

FOUR = [kind for kind in KINDS.values() if kind.bits == 4]


def made(kind: Kind, shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
    """Random codes, scales and, where the kind has them, minimums; scales of both signs."""
    generator = torch.Generator().manual_seed(seed)
    *E, N, K = shape
    lowest, highest, dtype = (0, 16, torch.uint8) if kind.bits == 4 else (-127, 128, torch.int8)
    codes = torch.randint(lowest, highest, shape, generator=generator, dtype=dtype)
    scale = torch.randn(*E, N, K // kind.group, generator=generator).half()
    minimum = torch.randn(*E, N, K // kind.group, generator=generator).half() if kind.has_minimum else None
    return codes, scale, minimum


def packed(kind: Kind, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    codes, scale, minimum = made(kind, shape, seed)
    return pack_int4(codes, scale, minimum) if kind.bits == 4 else pack_int8(codes, scale)


def test_the_sizes_of_blocks() -> None:
    assert {size: str(kind) for size, kind in KINDS.items()} == {
        144: "int4 group 32",
        160: "int4 group 32 minimum",
        528: "int4 group 128",
        544: "int4 group 128 minimum",
        272: "int8 group 32",
    }


@pytest.mark.parametrize("kind", FOUR, ids=str)
def test_every_4_bit_code_lies_where_it_should(kind: Kind) -> None:
    codes, scale, minimum = made(kind, (16, 2 * kind.group))
    blocks = pack_int4(codes, scale, minimum)
    assert blocks.shape == (2, 2, kind.block_bytes)
    for row in range(16):
        for group in range(2):
            block = blocks[row // 8, group]
            r = row % 8
            for v in range(kind.group // 8):
                for j in range(4):
                    byte = block[v * 32 + r * 4 + j].item()
                    column = group * kind.group + v * 8 + j
                    assert (byte & 15, byte >> 4) == (codes[row, column], codes[row, column + 4])
            numbers = block[kind.group * 4 :].clone().view(torch.float16)
            assert numbers[r] == scale[row, group]
            if minimum is not None:
                assert numbers[8 + r] == minimum[row, group]


def test_every_8_bit_code_lies_where_it_should() -> None:
    codes, scale, _ = made(INT8, (16, 64))
    blocks = pack_int8(codes, scale)
    assert blocks.shape == (2, 2, 272)
    for row in range(16):
        for column in range(64):
            v, j = divmod(column % 32, 4)
            assert blocks[row // 8, column // 32, v * 32 + row % 8 * 4 + j].view(torch.int8) == codes[row, column]
        assert blocks[row // 8, 1, 256:].clone().view(torch.float16)[row % 8] == scale[row, 1]


@pytest.mark.parametrize("shape", [(8, 128), (24, 384), (3, 16, 256)], ids=str)
@pytest.mark.parametrize("kind", KINDS.values(), ids=str)
def test_there_and_back(kind: Kind, shape: tuple[int, ...]) -> None:
    codes, scale, minimum = made(kind, shape)
    blocks = packed(kind, shape)
    assert kind_of(blocks) == kind
    assert (blocks.shape, blocks.dtype) == (kind.blocks_shape(shape), torch.uint8)
    assert blocks.is_contiguous() and kind.matrix_shape(blocks.shape) == shape and kind.fits(shape)
    back = unpack_int4(blocks) if kind.bits == 4 else (*unpack_int8(blocks), None)
    assert torch.equal(back[0], codes) and torch.equal(back[1], scale)
    assert (back[2] is None and minimum is None) or torch.equal(back[2], minimum)
    if len(shape) == 3:
        for e in range(shape[0]):
            assert torch.equal(dequantize(blocks)[e], dequantize(blocks[e]))


@pytest.mark.parametrize(("shape"), [(8, 33), (4, 32), (32,)], ids=str)
def test_a_shape_that_does_not_fit(shape: tuple[int, ...]) -> None:
    assert not Kind(4, 32).fits(shape)


@pytest.mark.parametrize(("type", "kind"), [(Type.Q4_0, Kind(4, 32)), (Type.Q4_1, Kind(4, 32, True)), (Type.Q8_0, INT8)])
def test_values_are_those_of_gguf(type: gguf.GGMLQuantizationType, kind: Kind) -> None:
    """Bit for bit: the same codes, scales and minimums in the file's own layout, dequantized by its own package."""
    codes, scale, minimum = made(kind, (64, 256), seed=1)
    numbers = [x.numpy()[..., None].view(np.uint8) for x in (scale, minimum) if x is not None]
    groups = codes.numpy().reshape(64, 8, 32)
    inner = groups.view(np.uint8) if kind.bits == 8 else groups[..., :16] | groups[..., 16:] << 4
    data = np.concatenate([*numbers, inner], axis=-1).reshape(64, -1)
    expected = torch.from_numpy(gguf.quants.dequantize(data, type))
    assert torch.equal(dequantize(packed(kind, (64, 256), seed=1)), expected)


@pytest.mark.parametrize("kind", KINDS.values(), ids=str)
def test_values_in_other_dtypes(kind: Kind) -> None:
    blocks = packed(kind, (16, 256))
    assert torch.equal(dequantize(blocks, torch.bfloat16), dequantize(blocks).bfloat16())
    exact = dequantize(blocks, torch.float64)
    assert torch.equal(exact.float(), dequantize(blocks))
    assert kind.has_minimum or torch.equal(exact, dequantize(blocks).double())


@pytest.mark.parametrize("bits", LARGEST)
def test_activations_are_rounded(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 96, generator=generator) * torch.logspace(-30, 30, 5)[:, None]
    x[2, 32:64] = 0
    codes, scale = round_activations(x, bits)
    assert (codes.dtype, scale.dtype, codes.shape, scale.shape) == (torch.int16, torch.float32, (5, 96), (5, 3))
    for t in range(5):
        for g in range(3):
            group = x[t, g * 32 : g * 32 + 32].numpy()
            d = np.float32(np.abs(group).max() / np.float32(LARGEST[bits]))
            assert scale[t, g] == d
            expected = np.rint(group * (np.float32(1) / d)) if d else np.zeros(32)
            assert codes[t, g * 32 : g * 32 + 32].tolist() == expected.tolist()
    assert codes.abs().amax(-1).tolist() == [LARGEST[bits]] * 5


def test_halves_go_to_the_even_code() -> None:
    x = torch.zeros(1, 32)
    x[0, :5] = torch.tensor([float(LARGEST[16]), 0.5, 1.5, 2.5, -0.5])
    assert round_activations(x)[0][0, :5].tolist() == [LARGEST[16], 0, 2, 2, 0]


def test_next_to_nothing_is_nothing() -> None:
    codes, scale = round_activations(torch.full((1, 32), 1e-38))
    assert codes.abs().max() == 0 and scale.isfinite().all()


@pytest.mark.parametrize("bits", LARGEST)
@pytest.mark.parametrize("kind", KINDS.values(), ids=str)
def test_the_product_is_the_sum_over_groups_of_integers(kind: Kind, bits: int) -> None:
    codes, scale, minimum = made(kind, (16, 256))
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(2))
    q, d = round_activations(x, bits)
    expected = torch.zeros(3, 16, dtype=torch.float64)
    for g in range(256 // 32):
        part, columns = g * 32 // kind.group, slice(g * 32, g * 32 + 32)
        w, a = codes[:, columns].long(), q[:, columns].long()
        s = scale[:, part].double()
        m = -8 * s if kind.bits == 4 else torch.zeros(16, dtype=torch.float64)
        m = minimum[:, part].double() if minimum is not None else m
        da = d[:, g, None].double()
        expected += s * da * (a @ w.T) + m * (da * a.sum(-1, keepdim=True))
    actual = blocks_linear_plain(x, packed(kind, (16, 256)), bits)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected.float(), rtol=1e-6, atol=1e-6)
    near = x @ dequantize(packed(kind, (16, 256))).T
    assert (actual - near).abs().max() < {8: 1e-2, 16: 1e-4}[bits] * near.abs().max()
