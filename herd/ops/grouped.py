"""One product for many experts: rows sorted by expert, each multiplied by the matrix of its own expert and no other."""

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_linear_plain(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """The definition: x [R, D] sorted by expert, weight [E, F, D], counts [E] rows of each expert -> [R, F]."""
    parts = torch.split(x, counts.tolist())
    return torch.cat([part @ w.T for part, w in zip(parts, weight, strict=True)])


def grouped_linear_mm(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """The same without a loop in Python and, on the GPUs that `herd/ops/pick.py` lists, without waiting for the counts.

    The kernel takes neither float64 nor matrices whose rows, or columns, are no multiple of 16 bytes.
    """
    ends = counts.cumsum(0).to(torch.int32)
    out: Tensor = F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    if out.requires_grad:  # nor, going back, strides like those of the gradient of `sum`
        out.register_hook(lambda g: g.clone(memory_format=torch.contiguous_format))  # type: ignore[no-untyped-call]
    return out
