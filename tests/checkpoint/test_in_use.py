"""A checkpoint that is being used may be replaced: weights are mapped, and what is mapped stays until nobody uses it."""

import shutil
from pathlib import Path

import pytest

import herd
from herd.checkpoint.convert import convert, write
from herd.checkpoint.load import load_model
from herd.checkpoint.quantize import quantize_checkpoint, quantized
from herd.engine.local import Model
from herd.errors import UsageError
from tests.checkpoint.made import LLAMACPP, entries, random_source


def said(model: Model) -> tuple[int, ...]:
    return model.generate([1, 2, 3], temperature=0, max_tokens=20, ignore_eos=True).tokens


def checkpoint(folder: Path, seed: int) -> Path:
    write(quantized(random_source(LLAMACPP, seed)), folder, "herd")
    return folder


def test_a_checkpoint_that_is_served_may_be_replaced(tmp_path: Path) -> None:
    """The folder is moved and deleted and another takes its name: replies go on as they were, and the next load has the new weights."""
    served, other = checkpoint(tmp_path / "model", 0), checkpoint(tmp_path / "new", 1)
    model = herd.load(served, kv_gib=0.01)
    before, wanted = said(model), said(herd.load(other, kv_gib=0.01))
    assert before != wanted
    model.unload()
    model.load()  # nothing of the weights has been touched yet
    served.rename(tmp_path / "old")
    other.rename(served)
    shutil.rmtree(tmp_path / "old")
    assert said(model) == before
    assert model.unload() and said(model) == wanted


@pytest.mark.parametrize("to", ["herd", "hf", "meta", "gguf"])
def test_nothing_is_written_over(to: str, tmp_path: Path) -> None:
    """Every writer refuses a place that is taken, itself included, and touches no byte of it."""
    served = checkpoint(tmp_path / "model", 0)
    dst = served if to != "gguf" else served / "model.safetensors"
    model = herd.load(served, kv_gib=0.01)
    held = {path.name: (path.stat().st_ino, path.read_bytes()) for path in served.iterdir()}
    for source in ("tiny", served):
        with pytest.raises(UsageError, match="exists already\nhint: name a new place; herd overwrites no checkpoint"):
            convert(source, dst, to)
    with pytest.raises(UsageError, match="exists already"):
        quantize_checkpoint("tiny", served, "int4")
    assert {path.name: (path.stat().st_ino, path.read_bytes()) for path in served.iterdir()} == held
    assert entries(tmp_path) == ["model"] and said(model)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")
def test_a_mapped_model_holds_no_descriptor(tmp_path: Path) -> None:
    """A process may have 1,024 as a rule, and Maverick has more tensors than that."""
    served = checkpoint(tmp_path / "model", 0)
    before = len(list(Path("/proc/self/fd").iterdir()))
    model, source = load_model(served)
    assert sum(stored.view is not None for stored in source.tensors.values()) > 10
    assert len(list(Path("/proc/self/fd").iterdir())) == before and model.norm.weight.isfinite().all()
