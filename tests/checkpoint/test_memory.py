"""The bound on memory: a conversion holds a few pieces of tensors, never a model."""

import subprocess
import sys
from pathlib import Path

import pytest

# Runs apart from pytest, whose own memory would hide the peak. Prints the bytes of the checkpoint and, for every conversion, by how much
# the process's peak grew over what it was after the same conversions of a small model.
SCRIPT = """
import sys
from dataclasses import replace
from pathlib import Path

import torch

from herd.checkpoint import source
from herd.checkpoint.convert import convert, write
from herd.checkpoint.names import herd_shapes
from herd.checkpoint.quantize import quantize_checkpoint
from tests.checkpoint.made import LLAMACPP

source.PIECE_BYTES = 8 << 20
torch.set_num_threads(1)


def made_up(shape):
    return source.Stored(shape, torch.float32, lambda a, b: torch.full((b - a, *shape[1:]), 0.5))


def peak():
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def run(config, folder):
    folder.mkdir()
    tensors = {name: made_up(shape) for name, shape in herd_shapes(config).items()}
    made = source.Source(config=config, tensors=tensors, kind="memory")
    write(made, folder / "herd", "herd")
    yield "herd", made.num_bytes
    for src, to in (("herd", "hf"), ("hf", "meta"), ("meta", "gguf"), ("gguf", "again")):
        convert(folder / src, folder / to, "herd" if to == "again" else to)
        yield f"{src} to {to}", made.num_bytes
    quantize_checkpoint(folder / "meta", folder / "int4")
    yield "meta to int4", made.num_bytes
    for to in ("hf", "gguf", "meta"):
        convert(folder / "int4", folder / f"int4-{to}", to)
        yield f"int4 to {to}", made.num_bytes
    quantize_checkpoint(folder / "hf", folder / "fp8", "fp8")
    yield "hf to fp8", made.num_bytes
    for src, to in (("fp8", "hf"), ("fp8-hf", "herd")):
        convert(folder / src, folder / f"{src}-{to}", to)
        yield f"{src} to {to}", made.num_bytes


folder = Path(sys.argv[1])
heads = replace(LLAMACPP, num_heads=8, num_kv_heads=8)
list(run(heads, folder / "small"))
before = peak()
large = replace(heads, width=512, hidden_width=512, dense_width=2048, num_experts=16, vocab_size=32768)
for what, num_bytes in run(large, folder / "large"):
    print(f"{what},{num_bytes},{peak() - before}")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_conversions_stream(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT, str(tmp_path)], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split(",") for line in done.stdout.splitlines()]
    assert len(rows) == 12
    for what, num_bytes, grown in rows:
        assert int(num_bytes) > 250e6
        assert int(grown) < 120e6, f"{what}: the peak grew by {int(grown) / 1e6:.0f} MB for {int(num_bytes) / 1e6:.0f} MB of weights"
