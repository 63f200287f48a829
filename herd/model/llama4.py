"""Llama 4, whole: read this first.

Tokens of many sequences lie end to end in one packed row of T, images have become `<|patch|>` tokens in it, and the same forward trains
and serves: what differs is the `attend` it is handed (`herd/ops/attend.py`).

Shapes, everywhere in herd:
    T tokens, packed over sequences   B sequences   L layers   D width   V vocabulary
    H query heads   G key/value heads   K head width   E experts   F hidden width   R rows routed to experts
    P pages   I image tiles   S pixels of a tile's side   N patches per tile   W vision width
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from herd.model.attention import Attention, Places, RMSNorm
from herd.model.config import ModelConfig
from herd.model.moe import MoE, SwiGLU
from herd.model.vision import Vision, normalize
from herd.ops.attend import Attend


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config, layer)
        self.ffn_norm = RMSNorm(config.width, config.norm_eps)
        self.ffn = MoE(config) if config.is_moe(layer) else SwiGLU(config.width, config.dense_width)

    def forward(self, x: Tensor, places: Places, attend: Attend) -> Tensor:
        x = x + self.attention(self.attention_norm(x), places, attend)
        x = x + self.ffn(self.ffn_norm(x))
        return x


class Embedding(nn.Embedding):
    """The table of token vectors, and, where head and embedding are tied, the output head."""

    def __init__(self, vocab_size: int, width: int) -> None:
        # given its weight, torch draws none: on "meta" that would import its compiler, a second and 80 MB
        super().__init__(vocab_size, width, _weight=torch.empty(vocab_size, width))

    def logits(self, x: Tensor) -> Tensor:
        """x: [n, D] -> [n, V]."""
        return F.linear(x, self.weight)


class Llama4(nn.Module):
    """A model of the family. Built without values: load a checkpoint into it, or call `init_weights`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = None if config.tied else nn.Linear(config.width, config.vocab_size, bias=False)
        self.vision = Vision(config.vision) if config.vision else None
        self.projector = nn.Linear(config.vision.adapter_width, config.width, bias=False) if config.vision else None

    def see(self, tiles: Tensor) -> Tensor:
        """Image tiles to the features that take the places of `<|patch|>` tokens: [I, S, S, 3] uint8 -> [I * tokens_per_tile, D]."""
        assert self.vision is not None and self.projector is not None, "this model has no vision encoder"
        features: Tensor = self.projector(self.vision(normalize(tiles))).flatten(0, 1)
        return features

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        attend: Attend,
        features: Tensor | None = None,
        *,
        patches: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Next-token logits.

        tokens: [T] int64.  positions: [T] int64, 0-based in each sequence.
        features: [number of patch tokens, D] in order, from `see`.
        patches: which of the T they replace; every `<|patch|>` if None, but one that a model wrote itself stands for no image.
        rows: [n] the tokens whose logits are wanted, all if None.  Returns [n or T, V] float32.
        """
        x = self.states(tokens, positions, attend, features, patches=patches)
        return self.logits(x if rows is None else x[rows])

    def states(
        self, tokens: Tensor, positions: Tensor, attend: Attend, features: Tensor | None = None, *, patches: Tensor | None = None
    ) -> Tensor:
        """What the last layer leaves, before the last norm: [T, D]. Arguments as for `forward`."""
        x: Tensor = self.embed(tokens)  # [T, D]
        if features is not None:
            if patches is None:
                patches = (tokens == self.config.patch_id).nonzero().squeeze(-1)
            x = x.index_copy(0, patches, features.type_as(x))
        places = Places.of(self.config, positions)
        for block in self.layers:
            x = block(x, places, attend)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """The last norm and the head: [n, D] -> [n, V] float32."""
        x = self.norm(x)
        logits: Tensor = self.embed.logits(x) if self.head is None else self.head(x)
        return logits.float()


def build(config: ModelConfig, *, device: str = "meta", dtype: torch.dtype = torch.float32) -> Llama4:
    """An empty model on `device`; on "meta" it takes no memory, whatever its size."""
    with torch.device(device):
        return Llama4(config).to(dtype)
