"""Meta's reference code of Llama 4 on one CPU: `fairscale`, which it needs to split a model over GPUs, played by plain modules.

With a world of one, a column- or row-parallel linear layer is a linear layer, and a reduction over the world is nothing. In a larger world
the modules have the shapes of one rank's part, which is enough to load a shard; nothing is computed there.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from torch import Tensor, nn

REFERENCE = [f"llama_models.llama4.{name}" for name in ("ffn", "moe", "model", "vision.encoder", "vision.embedding")]  # need fairscale


class Linear(nn.Linear):
    """`ColumnParallelLinear` and `RowParallelLinear`; how outputs are gathered does not matter."""

    parts_in, parts_out = 1, 1

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        gather_output: bool = True,
        input_is_parallel: bool = False,
        init_method: Any = None,
    ) -> None:
        del gather_output, input_is_parallel, init_method
        super().__init__(in_features // self.parts_in, out_features // self.parts_out, bias)


class Embedding(nn.Embedding):
    """`VocabParallelEmbedding`."""

    parts = 1

    def __init__(self, num_embeddings: int, embedding_dim: int, *, init_method: Any = None) -> None:
        del init_method
        super().__init__(num_embeddings // self.parts, embedding_dim)


def standins(world: int = 1) -> dict[str, ModuleType]:
    """The modules of fairscale that the reference imports, by name. world: ranks that share a model."""
    contents: dict[str, dict[str, Any]] = {
        "fairscale": {},
        "fairscale.nn": {},
        "fairscale.nn.model_parallel": {},
        "fairscale.nn.model_parallel.initialize": {"get_model_parallel_world_size": lambda: world},
        "fairscale.nn.model_parallel.layers": {
            "ColumnParallelLinear": type("ColumnParallelLinear", (Linear,), {"parts_out": world}),
            "RowParallelLinear": type("RowParallelLinear", (Linear,), {"parts_in": world}),
            "VocabParallelEmbedding": type("VocabParallelEmbedding", (Embedding,), {"parts": world}),
        },
        "fairscale.nn.model_parallel.mappings": {"reduce_from_model_parallel_region": lambda x: x},
    }
    modules = {name: ModuleType(name) for name in contents}
    for name, module in modules.items():
        module.__dict__.update(contents[name])
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    return modules


@contextmanager
def meta_reference(world: int = 1) -> Iterator[SimpleNamespace]:
    """The reference's `args`, `datatypes` and `model` on the CPU. Whatever the stand-ins and the patch touched is gone afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        for name in REFERENCE:
            patch.delitem(sys.modules, name, raising=False)
        for name, module in standins(world).items():
            patch.setitem(sys.modules, name, module)
        patch.setattr(Tensor, "cuda", lambda self: self)  # the attention layers put their caches on a GPU as they are made
        yield SimpleNamespace(**{name: importlib.import_module(f"llama_models.llama4.{name}") for name in ("args", "datatypes", "model")})
        for name in REFERENCE:
            sys.modules.pop(name, None)
