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

    def __init__(self, blocks: Tensor, bits: int = 16) -> None:
        """bits: of the activations that the blocks are multiplied with, 8 or 16."""
        super().__init__()
        self.bits = bits
        self.weight = nn.Buffer(blocks)  # [N/8, K/g, B] uint8

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, K] -> [T, N]."""
        return blocks_linear(x, self.weight, bits=self.bits)


class BlocksEmbedding(BlocksLinear):
    """An embedding whose table is blocks, and, tied, the output head."""

    def __init__(self, blocks: Tensor, dtype: torch.dtype, bits: int = 16) -> None:
        """dtype: of the rows that it gives."""
        super().__init__(blocks, bits)
        self.dtype = dtype

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: [T] -> [T, D]: the strips of 8 rows that hold them, one row of each."""
        strips = dequantize(self.weight[tokens // ROWS, None], self.dtype)  # [T, 8, D]
        rows: Tensor = strips[torch.arange(len(tokens), device=tokens.device), tokens % ROWS]
        return rows

    def logits(self, x: Tensor) -> Tensor:
        """x: [n, D] -> [n, V]."""
        return blocks_linear(x, self.weight, bits=self.bits)


class BlocksExperts(nn.Module):
    """`Experts` whose three tensors are blocks."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor, bits: int = 16) -> None:
        super().__init__()
        self.bits = bits
        self.gate, self.up, self.down = nn.Buffer(gate), nn.Buffer(up), nn.Buffer(down)  # [E, N/8, K/g, B] uint8

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """x: [R, D] rows sorted by expert, counts: [E] rows of each -> [R, D]."""
        hidden = F.silu(blocks_linear(x, self.gate, counts, bits=self.bits)) * blocks_linear(x, self.up, counts, bits=self.bits)
        return blocks_linear(hidden, self.down, counts, bits=self.bits)


def activation_bits(model: Llama4) -> int:
    """What the activations that meet blocks are rounded to; 0 in a model that holds none."""
    return max((module.bits for module in model.modules() if isinstance(module, BlocksLinear | BlocksExperts)), default=0)


WIDE = 2048  # from this width on, a model bears activations of 8 bits


def hold_blocks(model: Llama4, blocks: Mapping[str, Tensor], activation_bits: int = 0) -> None:
    """Give a model that has no values yet the blocks of some of its tensors, by their names in `state_dict`.

    activation_bits: 8 or 16; 0 takes 8 for a wide model, whose outliers are spread over many columns, and 16 for a narrow one.

    What is no linear layer, embedding or group of experts, and experts of which only a part is blocks, cannot hold them.
    """
    bits = activation_bits or (8 if model.config.width >= WIDE else 16)
    experts = {name.rpartition(".")[0] for name in blocks if ".experts." in name}
    for name in experts:
        gate, up, down = (blocks[f"{name}.{part}"] for part in ("gate", "up", "down"))
        swap(model, name, BlocksExperts(gate, up, down, bits))
    for name, tensor in blocks.items():
        if ".experts." not in name:
            owner = name.removesuffix(".weight")
            held = model.get_submodule(owner)
            assert isinstance(held, nn.Linear | nn.Embedding), f"{name} cannot hold {kind_of(tensor)}"
            swap(model, owner, BlocksEmbedding(tensor, held.weight.dtype, bits) if owner == "embed" else BlocksLinear(tensor, bits))
