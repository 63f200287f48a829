"""Which implementation of an op runs: decided here and nowhere else."""

from functools import partial

import torch
from torch import Tensor

from herd.ops.int4 import blocks_linear_plain, dequantize
from herd.ops.native import kernels
from herd.ops.sample import Draw, sample_plain


def blocks_linear(x: Tensor, blocks: Tensor, counts: Tensor | None = None, *, bits: int = 16) -> Tensor:
    """x [T, K] times blocks [N/8, K/g, B] -> [T, N]; with counts [E], x sorted by expert times [E, N/8, K/g, B].

    | device | built | implementation |
    |---|---|---|
    | CPU | native kernels | `herd.ops.native`, activations rounded to `bits` |
    | CPU | none | `blocks_linear_plain`, the same rounding |
    | GPU | | dequantized for the moment of the product, nothing rounded |
    """
    if x.device.type == "cpu":
        native = kernels()
        if native is not None:
            return native.product(x.float(), blocks, counts, bits=bits).type_as(x)
    product = partial(blocks_linear_plain, bits=bits) if x.device.type == "cpu" else _dequantized_linear
    if counts is None:
        return product(x, blocks).type_as(x)
    parts = torch.split(x, counts.tolist())
    return torch.cat([product(part, w) for part, w in zip(parts, blocks, strict=True)]).type_as(x)


def _dequantized_linear(x: Tensor, blocks: Tensor) -> Tensor:
    return x @ dequantize(blocks, x.dtype).T


def sample(logits: Tensor, draw: Draw) -> int:
    """logits [V] float32 -> a token: natively on a CPU where the kernels are built, else `sample_plain`. The same token on all."""
    native = kernels() if logits.device.type == "cpu" else None
    return native.sample(logits, draw) if native is not None else sample_plain(logits, draw)
