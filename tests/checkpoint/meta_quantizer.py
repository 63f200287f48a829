"""Meta's own quantizer and loader of Llama 4 on one CPU: `llama4/scripts/quantize.py` and `llama4/quantization/loader.py`, as they are.

Given in place of what they ask for: one rank's view of the world, a GPU that is the CPU, and fbgemm's function that rounds to fp8.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model.fairscale_standin import meta_reference

_FRESH = [
    f"llama_models.{name}" for name in ("quantize_impls", "llama4.scripts.quantize", "llama4.quantization.loader", "llama4.quantization")
]


def quantize_fp8_per_row(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """[.., N, K] -> codes and scales [.., N]. Source: fbgemm_gpu, experimental/gen_ai/src/quantize/quantize.cu."""
    scale = (x.float().abs().amax(-1) / 448).clamp(min=1 / (448 * 512))
    return (x.float() / scale[..., None]).clamp(-448, 448).to(torch.float8_e4m3fn), scale


@contextmanager
def meta_quantizer(world: int, rank: int) -> Iterator[SimpleNamespace]:
    """Their modules as rank `rank` of `world` sees them: `quantize`, `loader`, `impls`, `model`, `args`, and the enum `modes`."""
    with pytest.MonkeyPatch.context() as patch, meta_reference(world) as reference:
        modes = importlib.import_module("llama_models.datatypes").QuantizationMode
        for name in _FRESH:
            patch.delitem(sys.modules, name, raising=False)
        sys.modules["fairscale.nn.model_parallel.initialize"].__dict__.update(
            get_model_parallel_rank=lambda: rank, initialize_model_parallel=None, model_parallel_is_initialized=lambda: True
        )
        for name in ("fbgemm_gpu", "fbgemm_gpu.experimental", "fbgemm_gpu.experimental.gen_ai", "fire", "models", "models.llama4"):
            patch.setitem(sys.modules, name, ModuleType(name))
        impls = importlib.import_module("llama_models.quantize_impls")
        generation = ModuleType("models.llama4.generation")
        generation.__dict__["QuantizationMode"] = modes
        for name, module in (
            ("models.llama4.args", reference.args),
            ("models.llama4.model", reference.model),
            ("models.llama4.generation", generation),
            ("models.quantize_impls", impls),
        ):
            patch.setitem(sys.modules, name, module)
        patch.setattr(torch.ops, "fbgemm", SimpleNamespace(quantize_fp8_per_row=quantize_fp8_per_row), raising=False)
        patch.setattr(torch.cuda, "set_device", lambda _: None)
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        patch.setattr(torch.distributed, "barrier", lambda: None)
        patch.setattr(torch, "set_default_tensor_type", lambda _: torch.set_default_dtype(torch.bfloat16))
        move = Tensor.to
        patch.setattr(Tensor, "to", lambda self, *what, device=None, **how: move(self, *what, **how) if what or how else self)
        loader = importlib.import_module("llama_models.llama4.quantization.loader")
        patch.setattr(loader, "torch", SimpleNamespace(device=lambda _: None, load=torch.load))
        quantize = importlib.import_module("llama_models.llama4.scripts.quantize")
        try:
            yield SimpleNamespace(quantize=quantize, loader=loader, impls=impls, model=reference.model, args=reference.args, modes=modes)
        finally:
            torch.set_default_dtype(torch.float32)
            for name in _FRESH:
                sys.modules.pop(name, None)


def quantize_files(src: Path, dst: Path, mode: str, world: int) -> None:
    """Run their script, rank by rank, as it says it is to be run, and copy params.json."""
    for rank in range(world):
        with meta_quantizer(world, rank) as meta:
            meta.quantize.ffn_quantize(str(src), str(dst), meta.modes(mode), world)
    (dst / "params.json").write_bytes((src / "params.json").read_bytes())
