"""Keys and values of global layers in a file: the same bits as in memory, little of it in memory, and nothing left behind."""

import logging
import random
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from herd.chat import Sampling
from herd.checkpoint.convert import write
from herd.checkpoint.quantize import quantized
from herd.checkpoint.source import of_model
from herd.engine.config import EngineConfig
from herd.engine.engine import Engine
from herd.engine.mapped import MappedFile
from herd.engine.opening import open_engine
from herd.engine.pages import Capacity, Pages
from herd.engine.sequence import Sequence
from herd.errors import HerdError, ResourceError, UsageError
from herd.model.init import init_weights
from herd.model.llama4 import Llama4, build
from herd.model.presets import SCOUT, TINY
from herd.ops.native import kernels
from herd.text.prompt import Prompt
from herd.text.tokenizer import byte_tokenizer
from tests.engine.made import blocks_model

CONFIG = replace(
    TINY, width=128, num_heads=4, num_kv_heads=2, head_width=32, hidden_width=96, dense_width=96, vision=None, context_tokens=8192
)
MIB = 2**20

native = pytest.mark.skipif(kernels() is None, reason="the native kernels are not built here")
linux = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's /proc")


@pytest.fixture(scope="module")
def model() -> Llama4:
    return blocks_model(CONFIG)


def engine_of(model: Llama4, folder: Path | None, **choices: Any) -> Engine:
    choices = {"page_tokens": 4, "kv_gib": 0.03, "max_sequences": 3, "step_tokens": 256, "draft_tokens": 0, "pace": 0, **choices}
    return Engine(model, byte_tokenizer(), EngineConfig(kv_folder=folder, **choices))


def replies(engine: Engine, lengths: list[int], max_tokens: int = 4) -> list[list[int]]:
    """Greedy replies to random prompts of some lengths that are there together."""
    numbers = random.Random(7)
    sequences = [sequence_of(engine, [numbers.randrange(256) for _ in range(length)], max_tokens) for length in lengths]
    for sequence in sequences:
        engine.scheduler.add(sequence)
    while not engine.scheduler.is_idle:
        engine.step()
    return [sequence.tokens[length:] for sequence, length in zip(sequences, lengths, strict=True)]


def sequence_of(engine: Engine, tokens: list[int], max_tokens: int) -> Sequence:
    sampling = Sampling(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    return engine.sequence(Prompt(tokens=tokens, loss_mask=[False] * len(tokens)), sampling, lambda event: None)


def numbers_of(engine: Engine) -> list[torch.Tensor]:
    """The last logits of every call, in order."""
    found: list[torch.Tensor] = []
    whole = engine.runner.whole
    assert whole is not None

    def listen(inputs: Any) -> torch.Tensor:
        found.append(whole(inputs))
        return found[-1]

    engine.runner.whole = listen  # type: ignore[assignment]
    return found


@native
@linux
@pytest.mark.parametrize("kv", ["fp32", "fp16", "bf16", "int8"])
def test_a_file_holds_the_same_bits_as_memory(model: Llama4, tmp_path: Path, kv: str) -> None:
    """Prompts over many windows, together and one by one, decoded far apart, with pages that were used before."""
    seen, said = [], []
    for folder in (None, tmp_path):
        engine = engine_of(model, folder, kv=kv)
        if folder:
            shrink(engine, 64 << 10)  # blocks of 64 KB: as good as nothing at once
        found = numbers_of(engine)
        said.append([replies(engine, lengths) for lengths in ([1500], [700, 40, 900], [300, 1500])])
        seen.append(found)
    assert said[0] == said[1]
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def shrink(engine: Engine, window_bytes: int) -> None:
    """Below what a config may ask for."""
    assert engine.runner.whole is not None
    engine.runner.whole._table.file.contents.window = window_bytes


@contextmanager
def watched(engine: Engine) -> Iterator[list[int]]:
    """Bytes of the engine's file that are in memory, read again and again while the body runs.

    From the system's counter of files' bytes in this process: smaps is added up while pages come and go, and can show more than ever was.
    """
    engine.pages.let_go()
    before, found, stop = resident_of_files(), [0], threading.Event()

    def look() -> None:
        while not stop.is_set():
            found.append(resident_of_files() - before)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


def resident_of_files() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile:"))


@native
@linux
@pytest.mark.parametrize("kv", ["fp32", "int8"])
def test_memory_stays_within_the_window(model: Llama4, tmp_path: Path, kv: str) -> None:
    """A context of 4 MiB (fp32) seen through 1.5 MiB or less, while it is computed, decoded, stored as a prefix, and given to others."""
    engine = engine_of(model, tmp_path, kv=kv, kv_gib=2 / 1024, max_sequences=1, page_tokens=16, step_tokens=128, context_tokens=8192)
    assert engine.pages.file is not None
    window = engine.pages.capacity.window_bytes
    assert window < 2 * MIB
    shrink(engine, 768 << 10)
    replies(engine, [300])  # what of libraries comes in at first use is there
    with watched(engine) as resident:
        replies(engine, [7000], max_tokens=3)
        replies(engine, [5000], max_tokens=3)
    assert max(resident) <= 768 << 10
    assert max(resident) > 100 << 10, "there was something to see"


@native
@linux
def test_prefixes_go_to_the_disk_and_come_back_through_a_file(tmp_path: Path) -> None:
    """What one engine stored another restores into its file, and answers the same; and so does one without a file."""
    weights = of_model(init_weights(build(CONFIG, device="cpu"), std=0.15), byte_tokenizer().files())
    write(quantized(weights), tmp_path / "model", "herd")
    said = []
    for folder in (tmp_path / "file", tmp_path / "file", None):
        config = EngineConfig(kv_folder=folder, prefix_folder=tmp_path / "prefixes", page_tokens=4, kv_gib=0.03, draft_tokens=0)
        engine = open_engine(tmp_path / "model", config=config, device="cpu")
        with watched(engine) as resident:
            said.append(replies(engine, [1000]))
        assert engine.shelf is not None
        engine.shelf.store.flush()
        assert engine.stats().restored_tokens == (992 if len(said) > 1 else 0)
        assert not folder or max(resident) < engine.pages.capacity.window_bytes
    assert said[0] == said[1] == said[2]


@native
@linux
def test_nothing_is_left_and_nobody_sees_it(model: Llama4, tmp_path: Path) -> None:
    engine = engine_of(model, tmp_path / "made" / "for it")
    assert engine.pages.file is not None and engine.pages.file.num_bytes > MIB
    assert list((tmp_path / "made" / "for it").iterdir()) == [], "a process that is killed leaves nothing: the file has no name"


@linux
def test_all_of_it_is_taken_from_the_disk_at_once(tmp_path: Path) -> None:
    before = MappedFile(tmp_path, 1 << 20)
    tensor = before.tensor((3, 5), torch.float32)
    assert not tensor.any() and before.tensor((7,), torch.int8).data_ptr() == tensor.data_ptr() + 4096
    tensor += 2.0
    before.let_go()
    assert (tensor == 2.0).all()


@linux
def test_a_disk_that_is_full_is_an_error_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"no room for 1.07e\+09 GiB.*GiB are free"):
        MappedFile(tmp_path, 1 << 60)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))  # the system refuses the rest, as a full disk does
    try:
        with pytest.raises(ResourceError, match=r"no room for 0\.00195 GiB"):
            MappedFile(tmp_path, 2 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (tmp_path / "taken").write_text("")
    with pytest.raises(ResourceError, match="cannot hold a file"):
        MappedFile(tmp_path / "taken", 1 << 20)


@native
@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"kv_disk_gib": 0.001, "context_tokens": 8192}, "kv_disk_gib is 0.001"),
        ({"kv_gib": 0.00001}, "kv_gib is 1e-05"),
        ({"kv_gib": 0.0003, "step_tokens": 2048}, "steps of 2048 tokens need"),
        ({"kv_disk_gib": 0.0}, "kv_disk_gib is 0.0"),
    ],
)
def test_choices_that_cannot_be_are_refused(model: Llama4, tmp_path: Path, choices: dict[str, float], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        engine_of(model, tmp_path, **choices)


def test_what_cannot_read_from_a_file_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = EngineConfig(kv_folder=tmp_path, kv_gib=0.1)
    with pytest.raises(UsageError, match="on meta"):
        Pages(TINY, config, dtype=torch.float32, device=torch.device("meta"))
    with pytest.raises(HerdError, match="layer by layer"):
        open_engine("tiny", config=config, device="cpu")


def test_capacity_is_shared_between_memory_and_file() -> None:
    """Scout's million tokens, 48 GiB of global pages in bf16, with 8 GiB of memory."""
    config = EngineConfig(kv_folder=Path("unused"), kv_gib=8, kv_disk_gib=50, max_sequences=2, kv="bf16")
    capacity = Capacity.of(SCOUT, config, torch.bfloat16)
    assert capacity.context_tokens == capacity.full_pages * 16 == 50 * 2**30 // (12 * 4096 * 16) * 16
    assert capacity.local_pages * 16 == 2 * 8192
    assert capacity.window_bytes == 8 * 2**30 - 2 * 8192 * 36 * 4096


@pytest.mark.weights
def test_a_model_without_global_layers_needs_no_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="herd"):
        engine = open_engine("cria", config=EngineConfig(kv_folder=tmp_path, kv_gib=0.05), device="cpu")
    assert engine.pages.file is None and "kv_folder is of no use" in caplog.text
