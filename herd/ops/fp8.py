"""Matrices of 8-bit floats: what the codes mean.

A number of float8_e4m3fn has 4 bits of exponent and 3 of fraction: 2^-9 to 448, and NaN, but no infinity. A matrix [N, K] has scales
[N, n] in float32, each for K / n columns of its row: n is 1, but for files whose parts were quantized apart.
"""

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
LARGEST = 448.0


def dequantize(weight: Tensor, scale: Tensor) -> Tensor:
    """weight [.., N, K] float8, scale [.., N, n] float32 -> [.., N, K] float32. Exact where bfloat16 holds the scale, else rounded once."""
    values = torch.unflatten(weight.float(), -1, (scale.shape[-1], -1))
    values *= scale[..., None]
    return values.flatten(-2)
