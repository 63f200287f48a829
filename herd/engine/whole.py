"""A whole step in one native call, for models whose layers are blocks: the interpreter is left out of the loop over layers.

`Llama4.forward` is the definition; this builds the table of pointers that `ops/native/step.inl` walks, and a test holds the two equal.
"""

import ctypes
from array import array
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from herd.engine.inputs import Inputs
from herd.engine.mapped import MappedFile
from herd.engine.pages import Pages
from herd.model.llama4 import Block, Llama4
from herd.model.moe import MoE
from herd.model.rope import frequencies
from herd.model.swap import BlocksExperts, BlocksLinear, activation_bits
from herd.ops.attend import Reach
from herd.ops.native import Kernels, kernels, tables


class WholeStep:
    """A model bound to its pages and to the native kernels."""

    def __init__(self, model: Llama4, pages: Pages, native: Kernels) -> None:
        self.model, self.native = model, native
        c = model.config
        self._layers = (tables.Layer * c.num_layers)(*(_layer(block, i, pages) for i, block in enumerate(model.layers)))  # type: ignore[arg-type]
        qk_norm_eps = c.norm_eps if c.qk_norm else 0.0
        ends: tuple[Any, Any] = (model.embed, model.embed if model.head is None else model.head)
        self._embeds, self._heads = (isinstance(part, BlocksLinear) for part in ends)
        matrices = [tables.Matrix.of(part.weight) if isinstance(part, BlocksLinear) else tables.Matrix() for part in ends]
        self._frequencies = frequencies(c.head_width, c.rope_theta, c.rope_scaling).double()  # [K/2]
        self._table = tables.Model(
            c.width,
            c.num_heads,
            c.num_kv_heads,
            c.head_width,
            c.num_experts,
            c.experts_per_token if c.num_experts else 0,
            c.num_layers,
            activation_bits(model) // 8,
            c.norm_eps,
            qk_norm_eps,
            0,
            self._frequencies.data_ptr(),
            c.temperature_scale if c.temperature_tuning else 0.0,
            c.temperature_floor,
            self._layers,
            model.norm.weight.data_ptr(),
            *matrices,
            None if pages.file is None else ctypes.pointer(_file(pages.file, pages.capacity.window_bytes)),
        )
        self._kept = (model, pages)  # the table holds only addresses

    @staticmethod
    def bind(model: Llama4, pages: Pages) -> "WholeStep | None":
        """The native form of `model`, or None where a part of it cannot run natively."""
        native = kernels()
        if native is None or model.norm.weight.device.type != "cpu" or model.config.head_width % 16:
            return None
        if model.norm.weight.dtype != torch.float32 or not all(_is_blocks(block) for block in model.layers):
            return None
        return WholeStep(model, pages, native)

    def __call__(self, inputs: Inputs) -> Tensor:
        """What `model.forward` gives for a step's inputs: logits of the wanted rows, [n, V] float32."""
        embeds = self._embeds and inputs.features is None
        if embeds:
            x = torch.empty(len(inputs.tokens), self.model.config.width)
        else:
            x = self.model.embed(inputs.tokens).float()
            if inputs.features is not None:
                x = x.index_copy(0, inputs.patches, inputs.features.float())
            x = x.contiguous()
        logits = torch.empty(len(inputs.rows), self.model.config.vocab_size) if self._heads and len(inputs.rows) else None
        counts, starts = numbers(inputs.attend.counts), numbers(inputs.starts)
        local, local_kept = _reach(inputs.attend.local)
        full, full_kept = _reach(inputs.attend.full)
        step = tables.Step(
            len(x),
            len(inputs.starts),
            address(counts),
            address(starts),
            local,
            full,
            inputs.tokens.data_ptr() if embeds else None,
            x.data_ptr(),
            len(inputs.rows),
            inputs.rows.data_ptr(),
            None if logits is None else logits.data_ptr(),
        )
        self.native.step(self._table, step)
        del local_kept, full_kept
        if inputs.keep is not None:
            inputs.keep(self.model.norm, x)
        return self.model.logits(x[inputs.rows]) if logits is None else logits


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
        tables.Pages.of(pages.layers[index]),
        attention.is_local,
    )


def _file(file: MappedFile, window_bytes: int) -> tables.File:
    return tables.File(file.address, file.num_bytes, window_bytes, 0)


def _reach(reach: Reach | None) -> "tuple[tables.Reach, list[array[int]]]":
    """The table, and the arrays that must outlive it."""
    if reach is None:
        return tables.Reach(), []
    pages = array("q")
    for table in reach.tables:  # arrays too: copied, not counted out
        pages.extend(table)
    kept = [pages, numbers(map(len, reach.tables)), numbers(reach.lengths)]
    return tables.Reach(*map(address, kept), reach.page_tokens), kept


def numbers(values: Iterable[int]) -> "array[int]":
    """int64, end to end."""
    return array("q", values)


def address(values: "array[int]") -> int:
    return values.buffer_info()[0]
