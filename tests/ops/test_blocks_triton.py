"""The Triton kernels against the product with the dequantized matrix: on a GPU, or run by Triton's interpreter on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

IS_INTERPRETED = not torch.cuda.is_available()
if IS_INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
pytest.importorskip("triton", reason="triton is not installed")

from herd.ops.blocks_triton import FEW, product  # noqa: E402
from herd.ops.int4 import KINDS, Kind, dequantize  # noqa: E402
from tests.ops.test_int4 import packed  # noqa: E402

DEVICE = "cpu" if IS_INTERPRETED else "cuda"
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # of float32 sums; of their rounding to the others


def rows(R: int, K: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(R, K, generator=torch.Generator().manual_seed(R)).to(DEVICE, dtype)


def close(found: torch.Tensor, want: torch.Tensor) -> None:
    tolerance = TOLERANCES[found.dtype]
    largest = float(want.abs().max()) if want.numel() else 0.0
    torch.testing.assert_close(found.double(), want, rtol=tolerance, atol=tolerance * largest)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("R", [1, FEW, FEW + 1, 70])
@pytest.mark.parametrize("kind", KINDS.values(), ids=str)
def test_product(kind: Kind, R: int, dtype: torch.dtype) -> None:
    """One row and many, strips that do not fill a tile, more and fewer columns than one step takes."""
    if IS_INTERPRETED and dtype == torch.bfloat16 and R > FEW:
        pytest.skip("the interpreter's dot takes the bits of a bfloat16 for an integer")
    for shape in ((8, 128), (72, 384), (16, 1152)):
        x, blocks = rows(R, shape[1], dtype), packed(kind, shape).to(DEVICE)
        found = product(x, blocks)
        assert found.dtype == dtype
        close(found, x.double() @ dequantize(blocks, torch.float64).T)


@pytest.mark.parametrize("counts", [[1, 0, 2], [0, 0, 4], [20, 0, 3], [0, 17, 16], [0, 0, 0], [60, 1, 70]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS.values(), ids=str)
def test_experts(kind: Kind, dtype: torch.dtype, counts: list[int]) -> None:
    x, blocks = rows(sum(counts), 256, dtype), packed(kind, (3, 24, 256)).to(DEVICE)
    found = product(x, blocks, torch.tensor(counts, device=DEVICE))
    want = [part.double() @ dequantize(w, torch.float64).T for part, w in zip(x.split(counts), blocks, strict=True)]
    close(found, torch.cat(want))


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from herd.ops import blocks_triton as b
from herd.ops.int4 import KINDS
for kind in KINDS.values():
    for kernel, sizes in (b._one_row, {"STEP_WORDS": b.STEP_WORDS}), (b._tile, {"TILE_ROWS": 64, "TILE_COLUMNS": 64, "IS_EXACT": False}):
        constants = {"E": 16, "E_PADDED": 16, **b._facts(kind), **sizes}
        constants.pop("enable_fp_fusion")
        types = {"x": "*bf16", "words": "*i32", "numbers": "*fp16", "counts": "*i64", "y": "*bf16"}
        types |= {"R": "i32", "strips": "i32", "groups": "i32"} | dict.fromkeys(constants, "constexpr")
        source = ASTSource(kernel, types, constants)
        compiled = compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": True})
        assert compiled.asm["cubin"] and compiled.metadata.shared <= 99 * 1024, (kind, compiled.metadata.shared)
"""


@pytest.mark.slow
def test_they_compile_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    """Down to machine code of compute capability 9.0: what the interpreter lets pass, the compiler may not."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
