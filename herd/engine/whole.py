"""A whole step in one native call, for models whose layers are blocks: the interpreter is left out of the loop over layers.

`Llama4.forward` is the definition; this builds the table of pointers that `ops/native/step.inl` walks, and a test holds the two equal.
"""

from typing import Any

import torch
from torch import Tensor

from herd.engine.inputs import Inputs
from herd.engine.pages import Pages
from herd.model.attention import Places
from herd.model.llama4 import Block, Llama4
from herd.model.moe import MoE
from herd.model.swap import BlocksExperts, BlocksLinear
from herd.ops.attend import Reach
from herd.ops.native import Kernels, kernels, tables


class WholeStep:
    """A model bound to its pages and to the native kernels."""

    def __init__(self, model: Llama4, pages: Pages, native: Kernels) -> None:
        self.model, self.native = model, native
        c = model.config
        self._layers = (tables.Layer * c.num_layers)(*(_layer(block, i, pages) for i, block in enumerate(model.layers)))  # type: ignore[arg-type]
        qk_norm_eps = c.norm_eps if c.qk_norm else 0.0
        self._table = tables.Model(
            c.width,
            c.num_heads,
            c.num_kv_heads,
            c.head_width,
            c.num_experts,
            c.experts_per_token if c.num_experts else 0,
            c.num_layers,
            c.norm_eps,
            qk_norm_eps,
            self._layers,
        )
        self._kept = (model, pages)  # the table holds only addresses

    @staticmethod
    def bind(model: Llama4, pages: Pages) -> "WholeStep | None":
        """The native form of `model`, or None where a part of it cannot run natively."""
        native = kernels()
        if native is None or model.norm.weight.device.type != "cpu" or model.config.head_width % 8:
            return None
        floats = [model.norm.weight.dtype, pages.keys[0].dtype]
        if any(dtype != torch.float32 for dtype in floats) or not all(_is_blocks(block) for block in model.layers):
            return None
        return WholeStep(model, pages, native)

    def __call__(self, inputs: Inputs) -> Tensor:
        """What `model.forward` gives for a step's inputs: logits of the wanted rows, [n, V] float32."""
        x = self.model.embed(inputs.tokens).float()
        if inputs.features is not None:
            x = x.index_copy(0, inputs.patches, inputs.features.float())
        x = x.contiguous()
        places = Places.of(self.model.config, inputs.positions)
        cos, sin, temperature = (t.contiguous() for t in (places.cos, places.sin, places.temperature))
        counts = torch.tensor(inputs.attend.counts)
        local, local_kept = _reach(inputs.attend.local)
        full, full_kept = _reach(inputs.attend.full)
        step = tables.Step(
            len(x), len(counts), counts.data_ptr(), cos.data_ptr(), sin.data_ptr(), temperature.data_ptr(), local, full, x.data_ptr()
        )
        self.native.step(self._table, step)
        del local_kept, full_kept
        return self.model.logits(x[inputs.rows])


def _is_blocks(block: torch.nn.Module) -> bool:
    assert isinstance(block, Block)
    shared = block.ffn.shared if isinstance(block.ffn, MoE) else block.ffn
    linears = [getattr(block.attention, name) for name in "qkvo"] + [shared.gate, shared.up, shared.down]
    experts = not isinstance(block.ffn, MoE) or isinstance(block.ffn.experts, BlocksExperts)
    return experts and all(isinstance(linear, BlocksLinear) for linear in linears)


def _layer(block: Block, index: int, pages: Pages) -> tables.Layer:
    attention, moe = block.attention, block.ffn if isinstance(block.ffn, MoE) else None
    shared = block.ffn.shared if isinstance(block.ffn, MoE) else block.ffn
    weights: list[Any] = [attention.q, attention.k, attention.v, attention.o, shared.gate, shared.up, shared.down]
    experts = [tables.Matrix.of(t) for t in (moe.experts.gate, moe.experts.up, moe.experts.down)] if moe else [tables.Matrix()] * 3
    return tables.Layer(
        block.attention_norm.weight.data_ptr(),
        block.ffn_norm.weight.data_ptr(),
        *(tables.Matrix.of(linear.weight) for linear in weights),
        *experts,
        moe.router.weight.data_ptr() if moe else None,
        pages.keys[index].data_ptr(),
        pages.values[index].data_ptr(),
        attention.is_local,
    )


def _reach(reach: Reach | None) -> tuple[tables.Reach, tuple[Tensor, ...]]:
    """The table, and the tensors that must outlive it."""
    if reach is None:
        return tables.Reach(), ()
    read, lengths = torch.cat(reach.read), torch.tensor([len(slots) for slots in reach.read])
    return tables.Reach(reach.write.data_ptr(), read.data_ptr(), lengths.data_ptr()), (reach.write, read, lengths)
