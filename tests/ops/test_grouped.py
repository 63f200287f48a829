"""The grouped product against one row at a time: any counts, any widths, any gradient."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from herd.ops.grouped import grouped_linear_plain
from herd.ops.pick import grouped_linear

COUNTS = [[3, 0, 2], [0, 5, 0], [1, 1, 1], [0, 0, 1], [0, 0, 0], [40, 3, 17]]
WIDTHS = [(8, 16), (16, 8), (7, 5), (12, 10), (1, 1)]  # the last three are no multiples of 16 bytes in some or all dtypes
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.05, torch.float16: 0.01}

# Losses whose gradients come back dense, expanded from one number, expanded along rows or columns, and transposed.
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "square": lambda y: y.square().sum(),
    "sum": lambda y: y.sum(),
    "sum of rows": lambda y: (y.sum(0) * torch.arange(y.shape[1], dtype=y.dtype)).sum(),
    "sum of columns": lambda y: (y.sum(1) * torch.arange(y.shape[0], dtype=y.dtype)).sum(),
    "transposed": lambda y: (y.T @ torch.ones(y.shape[0], dtype=y.dtype)).sum(),
}


def inputs(counts: list[int], D: int, F: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(counts), D, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(len(counts), F, D, generator=generator).to(dtype).requires_grad_()
    return x, weight, torch.tensor(counts)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize(("D", "F"), WIDTHS)
def test_plain_is_one_row_at_a_time(counts: list[int], D: int, F: int) -> None:
    x, weight, tensor = inputs(counts, D, F, torch.float32)
    experts = [e for e, count in enumerate(counts) for _ in range(count)]
    expected = torch.stack([weight[e] @ row for e, row in zip(experts, x, strict=True)]) if experts else torch.empty(0, F)
    torch.testing.assert_close(grouped_linear_plain(x, weight, tensor), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize(("D", "F"), WIDTHS)
def test_grouped_equals_plain(D: int, F: int, counts: list[int], loss: str, dtype: torch.dtype) -> None:
    x, weight, tensor = inputs(counts, D, F, dtype)
    fast, plain = grouped_linear(x, weight, tensor), grouped_linear_plain(x, weight, tensor)
    assert fast.dtype == dtype
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(fast, plain, atol=tolerance * D**0.5, rtol=tolerance)
    for a, b in zip(*(torch.autograd.grad(LOSSES[loss](y), (x, weight)) for y in (fast, plain)), strict=True):
        torch.testing.assert_close(a, b, atol=tolerance * (1 + b.abs().max().item() if b.numel() else 1), rtol=tolerance)


def test_experts_without_rows_get_zero_gradient() -> None:
    x, weight, counts = inputs([3, 0, 2], 8, 16, torch.float32)
    grouped_linear(x, weight, counts).sum().backward()
    assert weight.grad is not None
    assert (weight.grad[1] == 0).all()
    assert (weight.grad[[0, 2]] != 0).any(-1).all()


def test_no_hook_where_no_gradient_is_wanted() -> None:
    x, weight, counts = inputs([3, 0, 2], 8, 16, torch.float32)
    with torch.no_grad():
        assert not grouped_linear(x, weight, counts).requires_grad
