"""Decoding in CUDA graphs: the layers of a step recorded once for each size of batch, then replayed with new inputs.

A decode step is some thousand small launches, and the GPU waits for Python between them; a graph makes them one. What a graph has
recorded it repeats, so nothing that depends on where a token stands may be a constant in it: embeddings, RoPE angles, temperatures and the
tables of slots are made anew for every step and copied into the buffers that the graph reads. The trap is local attention: its slots start
over at every chunk, and a table that stays as it was recorded answers well until position 8,192 and then writes gibberish.

Sizes are rounded up to powers of two: a short batch repeats its last row, which writes the same keys to the same slots once more.
`Llama4.forward` is the definition.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from herd.engine.inputs import Inputs
from herd.engine.pages import Pages
from herd.model.attention import Places
from herd.model.llama4 import Llama4
from herd.model.moe import Experts
from herd.model.swap import BlocksExperts, BlocksLinear
from herd.ops.attend import Table, Together
from herd.ops.pick import choose

LEAST_COLUMNS = 256  # of a table of slots

Forward = Callable[..., Tensor]
Record = Callable[[Forward, list[Tensor]], Callable[[], Tensor]]  # (function, its buffers) -> what computes it from them once more


@dataclass(frozen=True, slots=True)
class Recorded:
    """One graph."""

    buffers: list[Tensor]  # what it reads
    replay: Callable[[], Tensor]


class Graphs:
    """A model bound to its pages, and the graphs that were recorded of it so far."""

    def __init__(self, model: Llama4, pages: Pages, record: Record) -> None:
        self.model, self.pages, self._record = model, pages, record
        self._recorded: dict[tuple[int, ...], Recorded] = {}

    @staticmethod
    def bind(model: Llama4, pages: Pages) -> "Graphs | None":
        """The recording form of a model on a GPU, or None where a part of it makes the host wait for the device."""
        if any(_waits(module, model.norm.weight.dtype) for module in model.layers.modules()):
            return None
        return Graphs(model, pages, partial(record, pool=torch.cuda.graph_pool_handle()))

    @staticmethod
    def takes(inputs: Inputs) -> bool:
        """Whether every sequence decodes, and padding them to the longest is no great waste."""
        counts = inputs.attend.counts
        return inputs.features is None and max(counts) == 1 and (len(counts) == 1 or Together.suits(inputs.attend))

    def __call__(self, inputs: Inputs) -> Tensor:
        """What `model.forward` gives for a step's inputs: logits of the wanted rows, [n, V] float32."""
        num_rows = _power_of_two(len(inputs.tokens))
        with torch.cuda.device_of(inputs.tokens):  # type: ignore[no-untyped-call]
            fresh = [_padded(tensor, num_rows) for tensor in self._fresh(inputs)]
            sizes = tuple(size for tensor in fresh for size in tensor.shape[:2])
            found = self._recorded.get(sizes)
            if found is None:
                buffers = [tensor.clone() for tensor in fresh]
                found = self._recorded[sizes] = Recorded(buffers, self._record(self._layers, buffers))
            for buffer, tensor in zip(found.buffers, fresh, strict=True):
                buffer.copy_(tensor)
            return found.replay()[inputs.rows]

    def _fresh(self, inputs: Inputs) -> list[Tensor]:
        """The arguments of `_layers`, their first dims the rows of the step."""
        places = Places.of(self.model.config, inputs.positions)
        tensors = [self.model.embed(inputs.tokens), places.cos, places.sin, places.temperature]
        for reach in (inputs.attend.local, inputs.attend.full):
            if reach is not None:
                table = Table.of(reach, inputs.tokens.device, max(LEAST_COLUMNS, _power_of_two(max(reach.lengths))))
                tensors += [table.write, table.read, table.visible]
        return tensors

    def _layers(self, x: Tensor, cos: Tensor, sin: Tensor, temperature: Tensor, *tables: Tensor) -> Tensor:
        """What is recorded: [B, D] -> logits [B, V]. tables: `write`, `read` and `visible` of the kinds of layers that the model has."""
        config = self.model.config
        local = Table(*tables[:3]) if config.local_layers else None
        full = Table(*tables[-3:]) if config.global_layers else None
        attend, places = Together(self.pages.layers, local, full), Places(cos, sin, temperature)
        for block in self.model.layers:
            x = block(x, places, attend)
        return self.model.logits(x)


def record(forward: Forward, buffers: list[Tensor], pool: Any) -> Callable[[], Tensor]:
    """A CUDA graph of `forward(*buffers)`. pool: the memory that all graphs share, so a result lasts until the next replay."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        forward(*buffers)  # what is compiled or set up at its first use cannot be recorded
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # other threads may go on with what they do
        out = forward(*buffers)

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


def _waits(module: torch.nn.Module, dtype: torch.dtype) -> bool:
    """Whether the host waits for the device in it, by the table in `herd/ops/pick.py`."""
    if isinstance(module, Experts):
        return choose("experts", module.gate.device.type, dtype, None, module.gate, None).waits
    if isinstance(module, BlocksLinear | BlocksExperts):
        blocks = next(module.buffers())
        return choose("blocks", blocks.device.type, dtype, None, blocks, None, 16).waits
    return False


def _power_of_two(count: int) -> int:
    """The least power of two that is no smaller."""
    return 1 << (count - 1).bit_length()


def _padded(tensor: Tensor, num_rows: int) -> Tensor:
    """The last row again and again, up to so many rows."""
    more = num_rows - len(tensor)
    return torch.cat([tensor, tensor[-1:].expand(more, *tensor.shape[1:])]) if more else tensor
