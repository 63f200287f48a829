"""Ops on a CUDA device against their definitions. What only Triton does is in `test_blocks_triton.py`, which runs without a GPU as well."""

import pytest
import torch

from herd.ops import pick
from herd.ops.attend import Paged, Reach, Slots, Together
from herd.ops.grouped import grouped_linear_plain
from herd.ops.int4 import KINDS, Kind, dequantize
from herd.ops.pick import blocks_linear, grouped_linear, paged
from tests.ops.test_int4 import packed

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def close(found: torch.Tensor, want: torch.Tensor) -> None:
    tolerance = TOLERANCES[found.dtype]
    torch.testing.assert_close(found.double(), want.double(), rtol=tolerance, atol=tolerance * float(want.abs().max()))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("T", [1, 4, 16, 300])
@pytest.mark.parametrize("kind", KINDS.values(), ids=str)
def test_blocks_linear_equals_the_product_with_the_matrix(kind: Kind, T: int, dtype: torch.dtype) -> None:
    blocks, x = packed(kind, (640, 1280)).to(DEVICE), numbers(T, 1280, dtype=dtype)
    close(blocks_linear(x, blocks), x.double() @ dequantize(blocks, torch.float64).T)


@pytest.mark.parametrize("counts", [[1, 0, 0, 2], [40, 0, 3, 200]], ids=str)
@pytest.mark.parametrize("kind", KINDS.values(), ids=str)
def test_blocks_of_experts_equal_one_product_each(kind: Kind, counts: list[int]) -> None:
    blocks, x = packed(kind, (4, 320, 640)).to(DEVICE), numbers(sum(counts), 640, dtype=torch.bfloat16)
    want = [part.double() @ dequantize(w, torch.float64).T for part, w in zip(x.split(counts), blocks, strict=True)]
    close(blocks_linear(x, blocks, torch.tensor(counts, device=DEVICE)), torch.cat(want))


@pytest.mark.parametrize("counts", [[1, 0, 0, 2], [40, 0, 3, 200]], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_experts_equal_the_loop(dtype: torch.dtype, counts: list[int]) -> None:
    x, weight = numbers(sum(counts), 128, dtype=dtype), numbers(4, 96, 128, dtype=dtype, seed=1)
    rows = torch.tensor(counts, device=DEVICE)
    close(grouped_linear(x, weight, rows), grouped_linear_plain(x.double(), weight.double(), rows))


def test_decoding_together_equals_by_sequence() -> None:
    lengths = [3, 700, 1, 256]
    slots = torch.randperm(sum(lengths))
    reach = Reach([own.tolist() for own in slots.split(lengths)], lengths, page_tokens=1)
    keys, values = (numbers(len(slots), 8, 1, 128, dtype=torch.bfloat16, seed=seed) for seed in (0, 1))
    by_sequence = Paged([Slots(keys, values)], [1] * 4, None, reach)
    together = paged(by_sequence)
    assert isinstance(together, Together)
    q, k, v = (numbers(4, heads, 128, dtype=torch.bfloat16, seed=2 + heads) for heads in (40, 8, 8))
    close(together(0, False, q, k, v), by_sequence(0, False, q, k, v))


def test_blocks_stay_blocks_where_triton_is() -> None:
    able, words = pick._triton()
    assert pick.holds_blocks(DEVICE, torch.bfloat16) is able, words
