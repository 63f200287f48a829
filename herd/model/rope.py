"""Rotary positions: angles for text (with Llama 3's scaling), angles for image patches, and the turn itself.

Pairs are neighbours, (x[2i], x[2i+1]), as in Meta's code; Llama 4's Hugging Face files keep that order too, unlike Llama 2 and 3.
"""

import math

import torch
from torch import Tensor

from herd.model.config import ModelConfig, RopeScaling, VisionConfig


def frequencies(head_width: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Radians per token of each pair: [K/2] float32. Source: Meta's `precompute_freqs_cis` and `apply_scaling`."""
    freqs = 1.0 / (theta ** (torch.arange(0, head_width, 2, dtype=torch.float32) / head_width))
    if scaling is None:
        return freqs
    wavelength = 2 * math.pi / freqs
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = torch.zeros_like(freqs)
    if high != low:  # Scout has high == low: a hard switch, and no division by zero
        blend = (scaling.original_tokens / wavelength - low) / (high - low)
    scaled = freqs / scaling.factor
    mixed = (1 - blend) * scaled + blend * freqs
    is_short = wavelength < scaling.original_tokens / high
    is_long = wavelength > scaling.original_tokens / low
    return torch.where(is_short, freqs, torch.where(is_long, scaled, mixed))


def text_angles(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin for each token: positions [T] -> two of [T, 1, K/2] float32.

    The product is taken in float64: at position 10,000,000 a float32 angle is off by up to half a radian.
    """
    freqs = frequencies(config.head_width, config.rope_theta, config.rope_scaling).to(positions.device)
    angles = positions.double()[:, None, None] * freqs.double()  # [T, 1, K/2]
    return angles.cos().float(), angles.sin().float()


def vision_angles(config: VisionConfig) -> tuple[Tensor, Tensor]:
    """cos and sin for each patch of a tile, the class token last with angle 0: two of [N+1, 1, K/2] float32.

    The first half of the pairs turns with the column + 1, the second with the row + 1. Source: Meta's `vision/encoder.py`.
    """
    half = config.width // config.num_heads // 2
    freqs = 1.0 / (config.rope_theta ** (torch.arange(0, half, 2, dtype=torch.float32) / half))  # [K/4]
    patch = torch.arange(config.grid**2)
    column, row = patch % config.grid + 1, patch // config.grid + 1
    angles = torch.cat([column[:, None] * freqs, row[:, None] * freqs], dim=-1)  # [N, K/2]
    angles = torch.cat([angles, torch.zeros_like(angles[:1])])[:, None]  # [N+1, 1, K/2]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn neighbouring pairs of x [..., heads, K] by angles given as cos and sin [..., 1, K/2]; float32 inside."""
    even, odd = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return turned.flatten(-2).type_as(x)
