"""The eyes: a ViT over each 336-pixel tile, pixel shuffle to a quarter of the tokens, an adapter. Tiles never see each other.

Source: Meta's `vision/encoder.py` and `vision/embedding.py`. Traps: the class token is appended *last*, RoPE's first half is the column,
coordinates start at 1, the activation follows *both* adapter layers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from herd.model.config import VisionConfig
from herd.model.rope import rotate, vision_angles


def normalize(tiles: Tensor) -> Tensor:
    """Pixels [I, S, S, 3] uint8 -> [I, 3, S, S] float32 in [-1, 1]. Source: mean = std = 0.5 per channel, rescale 1/255."""
    return (tiles.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5


def pixel_shuffle(x: Tensor, grid: int, side: int) -> Tensor:
    """Join each square of side x side patches into one token: [I, grid * grid, W] -> [I, (grid / side)^2, side * side * W].

    Inside a token the order is (row, column) = (0, 0), (0, 1), (1, 0), (1, 1).
    """
    I, _, W = x.shape
    x = x.view(I, grid // side, side, grid // side, side, W)
    return x.transpose(2, 3).reshape(I, (grid // side) ** 2, side * side * W)


class VisionAttention(nn.Module):
    """Full attention within a tile, 2D RoPE, biases everywhere."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(config.width, config.width) for _ in range(4))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [I, N+1, W] -> [I, N+1, W]."""
        q, k, v = (proj(x).unflatten(-1, (self.num_heads, -1)) for proj in (self.q, self.k, self.v))  # [I, N+1, H, K]
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))  # [I, H, N+1, K]
        out: Tensor = self.o(y.transpose(1, 2).flatten(-2))
        return out


class VisionMLP(nn.Module):
    """up, exact GELU, down."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, config.hidden_width)
        self.down = nn.Linear(config.hidden_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.gelu(self.up(x)))
        return y


class VisionBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attention = VisionAttention(config)
        self.mlp_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = VisionMLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        x = x + self.mlp(self.mlp_norm(x))
        return x


class Adapter(nn.Module):
    """Shuffled patches to the width that the projector takes; GELU after both layers, no biases."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width * config.shuffle**2, config.adapter_width, bias=False)
        self.down = nn.Linear(config.adapter_width, config.adapter_width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.down(F.gelu(self.up(x))))


class Vision(nn.Module):
    """Tiles to features, all tiles as independent images."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch = nn.Linear(3 * config.patch_pixels**2, config.width, bias=False)
        self.cls = nn.Parameter(torch.empty(config.width))
        self.positions = nn.Parameter(torch.empty(config.grid**2 + 1, config.width))  # the class token's row is the last
        self.norm_in = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.layers = nn.ModuleList(VisionBlock(config) for _ in range(config.num_layers))
        self.norm_out = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.adapter = Adapter(config)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: [I, 3, S, S] normalised -> [I, tokens_per_tile, adapter_width]."""
        c = self.config
        patches = F.unfold(pixels.to(self.patch.weight.dtype), c.patch_pixels, stride=c.patch_pixels).transpose(1, 2)  # [I, N, 588]
        x = self.patch(patches)
        x = torch.cat([x, self.cls.expand(len(x), 1, -1)], dim=1) + self.positions  # [I, N+1, W]
        x = self.norm_in(x)
        cos, sin = (angle.to(x.device) for angle in vision_angles(c))
        for block in self.layers:
            x = block(x, cos, sin)
        x = self.norm_out(x)[:, :-1]  # [I, N, W]
        y: Tensor = self.adapter(pixel_shuffle(x, c.grid, c.shuffle))
        return y
