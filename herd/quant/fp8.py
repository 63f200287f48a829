"""Rounding to the nearest 8-bit float, with one scale for each row of a matrix, and which matrices of a model get it.

The published FP8 files of Llama 4 agree on the routed experts. Meta's keep all else in bfloat16; those that llm-compressor makes have the
shared experts and dense layers as well, and leave out attention, router, embedding, head and eyes. The latter it is here: what it adds to
the experts is read for every token, and attention is 3% of Scout. Source: llm-compressor's Llama 4 example, its `ignore` list;
llama_models, llama4/quantization/loader.py.

A row's number of largest magnitude becomes 448 or nearly so: its scale is rounded to bfloat16, in which published files have theirs. So
code times scale is exact in float32, whoever multiplies. rms error over rms weight: 0.0264 for Gaussian weights, whatever the row's
length; int8 in groups of 32, a bit more room, has 0.0053.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from herd.errors import CheckpointError
from herd.ops.fp8 import FP8, LARGEST
from herd.quant.int4 import part_of

_PARTS = ("dense", "shared", "experts")


def plan(names: Iterable[str]) -> list[str]:
    """The matrices of a model that become 8-bit floats, of all its tensors by herd's names."""
    return [name for name in names if part_of(name) in _PARTS]


def scales(weight: Tensor, *, name: str = "the matrix") -> Tensor:
    """The scales [.., N, 1] float32 of a matrix [.., N, K], 1 for a row of zeros. Raises `CheckpointError` for what is not finite."""
    scale = (weight.abs().amax(-1, keepdim=True).float() / LARGEST).bfloat16().float()
    if not scale.isfinite().all():
        raise CheckpointError(f"{name} holds NaN or infinity", "the checkpoint is broken; weights of a trained model are small")
    return torch.where(scale == 0, 1.0, scale)


def quantize(weight: Tensor, scale: Tensor) -> Tensor:
    """The codes [.., N, K] float8 of a matrix [.., N, K] of floats with such scales."""
    return (weight.float() / scale).clamp_(-LARGEST, LARGEST).to(FP8)
