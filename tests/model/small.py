"""Small models of the family with random weights, and random prompts with images, for tests against other implementations.

Everything that is special in Llama 4 must show in the logits of some sixty tokens: chunks of 16, a temperature that steps every 8
tokens, a frequency scaling that reaches pairs with short wavelengths, weights large enough that logits spread over several units.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from herd.model.config import ModelConfig, RopeScaling, VisionConfig
from herd.model.llama4 import Llama4, build
from herd.ops.attend import Packed

VISION = VisionConfig(
    width=24, num_layers=2, num_heads=3, hidden_width=96, tile_pixels=24, patch_pixels=4, adapter_width=20
)  # 6 x 6 patches, 9 tokens per tile

SCOUT = ModelConfig(
    width=48,
    num_layers=5,
    num_heads=6,
    num_kv_heads=2,
    head_width=16,
    vocab_size=160,
    hidden_width=40,
    dense_width=56,
    num_experts=4,
    chunk_tokens=16,
    rope_theta=1000.0,
    rope_scaling=RopeScaling(original_tokens=64),  # of the wavelengths 6, 15, 35, 84, 199, ... the last are scaled
    qk_norm=True,
    temperature_floor=8,
    patch_id=150,
    vision=VISION,
)

FAMILIES = {
    "scout": SCOUT,
    "maverick": replace(SCOUT, moe_step=2, num_experts=8, rope_scaling=None, qk_norm=False),
    "guard": replace(SCOUT, num_experts=0, global_step=None, chunk_tokens=None),
    "scout, 2 experts, blended scaling": replace(
        SCOUT, experts_per_token=2, rope_scaling=RopeScaling(factor=8.0, high_freq_factor=4.0, original_tokens=64)
    ),
    "maverick, 3 experts, no temperature": replace(
        SCOUT, moe_step=2, experts_per_token=3, rope_scaling=None, qk_norm=False, global_step=2, temperature_tuning=False
    ),
}

SHAPES = {
    "3 queries a key": {},
    "as many keys": {"num_heads": 4, "num_kv_heads": 4, "head_width": 6},
    "one key, odd widths": {"width": 37, "num_heads": 3, "num_kv_heads": 1, "head_width": 10, "hidden_width": 21, "dense_width": 35},
}


@torch.no_grad()
def random_model(config: ModelConfig, seed: int) -> Llama4:
    """A model whose every parameter is random: matrices N(0, 0.15^2), norm weights around 1, biases and embeddings larger than usual."""
    model = build(config, device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        p.copy_(1 + 0.2 * noise if "norm" in name and name.endswith("weight") else 0.15 * noise)
    return model


@dataclass(frozen=True)
class Prompt:
    """One document: text tokens with runs of patch tokens, and the tiles that belong there."""

    tokens: Tensor  # [T]
    tiles: Tensor | None  # [I, S, S, 3] uint8

    @property
    def pixels(self) -> Tensor | None:
        """The tiles as other implementations take them: [I, 3, S, S] in [-1, 1]."""
        return None if self.tiles is None else self.tiles.permute(0, 3, 1, 2).float() / 127.5 - 1


def random_prompt(config: ModelConfig, num_text: int, num_tiles: int = 0, seed: int = 0) -> Prompt:
    """`num_text` tokens of text, cut at random places by the tokens of `num_tiles` tiles."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, config.patch_id, (num_text,), generator=generator)
    if not num_tiles:
        return Prompt(text, None)
    assert config.vision is not None
    cuts = torch.randint(0, num_text + 1, (num_tiles,), generator=generator).sort().values.tolist()
    patches = torch.full((config.vision.tokens_per_tile,), config.patch_id)
    pieces: list[Tensor] = []
    for start, end in zip([0, *cuts], [*cuts, num_text], strict=True):
        pieces += [text[start:end], patches]
    side = config.vision.tile_pixels
    tiles = torch.randint(0, 256, (num_tiles, side, side, 3), generator=generator, dtype=torch.uint8)
    return Prompt(torch.cat(pieces[:-1]), tiles)


def packed_logits(model: Llama4, prompts: Sequence[Prompt]) -> Tensor:
    """Logits [T, V] of all prompts in one packed forward."""
    tiles = [prompt.tiles for prompt in prompts if prompt.tiles is not None]
    return model(
        torch.cat([prompt.tokens for prompt in prompts]),
        torch.cat([torch.arange(len(prompt.tokens)) for prompt in prompts]),
        Packed([len(prompt.tokens) for prompt in prompts], model.config.chunk_tokens),
        model.see(torch.cat(tiles)) if tiles else None,
    )


def text_loss(config: ModelConfig, logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross entropy of the next token wherever that is text."""
    targets = tokens[1:].masked_fill(tokens[1:] == config.patch_id, -100)
    return F.cross_entropy(logits[:-1], targets)
