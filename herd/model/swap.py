"""Surgery on a finished model: put one module in the place of another, from outside. Here, modules that hold 4-bit and 8-bit blocks.

The model stays as it is written; what a module computes with is not its business. `herd/ops/int4.py` says what blocks are.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from herd.model.llama4 import Llama4
from herd.ops.int4 import ROWS, dequantize, kind_of
from herd.ops.pick import blocks_linear


def swap(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `name` ("layers.3.attention.q") is."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


class BlocksLinear(nn.Module):
    """`nn.Linear` without bias whose weight is blocks."""

    def __init__(self, blocks: Tensor) -> None:
        super().__init__()
        self.weight = nn.Buffer(blocks)  # [N/8, K/g, B] uint8

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, K] -> [T, N]."""
        return blocks_linear(x, self.weight)


class BlocksEmbedding(BlocksLinear):
    """An embedding whose table is blocks, and, tied, the output head."""

    def __init__(self, blocks: Tensor, dtype: torch.dtype) -> None:
        """dtype: of the rows that it gives."""
        super().__init__(blocks)
        self.dtype = dtype

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: [T] -> [T, D]: the strips of 8 rows that hold them, one row of each."""
        strips = dequantize(self.weight[tokens // ROWS, None], self.dtype)  # [T, 8, D]
        rows: Tensor = strips[torch.arange(len(tokens), device=tokens.device), tokens % ROWS]
        return rows

    def logits(self, x: Tensor) -> Tensor:
        """x: [n, D] -> [n, V]."""
        return blocks_linear(x, self.weight)


class BlocksExperts(nn.Module):
    """`Experts` whose three tensors are blocks."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Buffer(gate), nn.Buffer(up), nn.Buffer(down)  # [E, N/8, K/g, B] uint8

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """x: [R, D] rows sorted by expert, counts: [E] rows of each -> [R, D]."""
        hidden = F.silu(blocks_linear(x, self.gate, counts)) * blocks_linear(x, self.up, counts)
        return blocks_linear(hidden, self.down, counts)


def hold_blocks(model: Llama4, blocks: Mapping[str, Tensor]) -> None:
    """Give a model that has no values yet the blocks of some of its tensors, by their names in `state_dict`.

    What is no linear layer, embedding or group of experts, and experts of which only a part is blocks, cannot hold them.
    """
    experts = {name.rpartition(".")[0] for name in blocks if ".experts." in name}
    for name in experts:
        swap(model, name, BlocksExperts(*(blocks[f"{name}.{part}"] for part in ("gate", "up", "down"))))
    for name, tensor in blocks.items():
        if ".experts." not in name:
            owner = name.removesuffix(".weight")
            held = model.get_submodule(owner)
            assert isinstance(held, nn.Linear | nn.Embedding), f"{name} cannot hold {kind_of(tensor)}"
            swap(model, owner, BlocksEmbedding(tensor, held.weight.dtype) if owner == "embed" else BlocksLinear(tensor))
