"""One attention layer: makes q, k, v (RoPE or none, QK norm, temperature) and asks `attend` for the rest."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from herd.model.config import ModelConfig
from herd.model.rope import rotate, text_angles
from herd.ops.attend import Attend


class RMSNorm(nn.Module):
    """Root-mean-square norm: in float32, cast back, and only then times the weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms(x, self.eps) * self.weight


def rms(x: Tensor, eps: float) -> Tensor:
    """x / rms(x) over the last dim, without a weight."""
    return F.rms_norm(x.float(), x.shape[-1:], None, eps).type_as(x)


@dataclass(frozen=True, slots=True)
class Places:
    """What the layers need to know of the tokens' positions, computed once per forward."""

    cos: Tensor  # [T, 1, K/2] for local layers
    sin: Tensor
    temperature: Tensor  # [T, 1, 1] for global layers

    @staticmethod
    def of(config: ModelConfig, positions: Tensor) -> "Places":
        """positions: [T] 0-based in each sequence."""
        cos, sin = text_angles(config, positions)
        return Places(cos, sin, temperature(config, positions)[:, None, None])


def temperature(config: ModelConfig, positions: Tensor) -> Tensor:
    """Factor on the queries of global layers: [T] float32. 1 up to position floor - 2, then 1 + scale * ln(1 + steps).

    Source: scalable softmax, arXiv 2501.19399; Meta's `model.py`.
    """
    if not config.temperature_tuning:
        return torch.ones(positions.shape, device=positions.device)
    steps = ((positions + 1) // config.temperature_floor).double()  # integers: a float32 position is inexact past 16.7M
    return (1 + config.temperature_scale * torch.log1p(steps)).float()


class Attention(nn.Module):
    """Grouped-query attention of layer `layer`: local (chunked, RoPE, QK norm) or global (full, no RoPE, temperature)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        D, H, G, K = config.width, config.num_heads, config.num_kv_heads, config.head_width
        self.layer, self.head_width = layer, K
        self.is_local = config.is_local(layer)
        self.qk_norm_eps = config.norm_eps if config.qk_norm and self.is_local else None
        self.q = nn.Linear(D, H * K, bias=False)
        self.k = nn.Linear(D, G * K, bias=False)
        self.v = nn.Linear(D, G * K, bias=False)
        self.o = nn.Linear(H * K, D, bias=False)

    def forward(self, x: Tensor, places: Places, attend: Attend) -> Tensor:
        """x: [T, D] -> [T, D]."""
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_width)) for proj in (self.q, self.k, self.v))  # [T, heads, K]
        if self.is_local:
            q, k = rotate(q, places.cos, places.sin), rotate(k, places.cos, places.sin)
        else:
            q = (q * places.temperature).type_as(q)
        if self.qk_norm_eps is not None:
            q, k = rms(q, self.qk_norm_eps), rms(k, self.qk_norm_eps)
        y: Tensor = self.o(attend(self.layer, self.is_local, q, k, v).flatten(-2))
        return y
