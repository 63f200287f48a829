"""What an engine holds against what `herd inspect` says that it takes: keys and values, and the records of their pages."""

import gc
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from herd.chat import Sampling
from herd.engine.config import EngineConfig
from herd.engine.engine import Engine
from herd.engine.lookup import Lookup
from herd.engine.memory import hand_back
from herd.engine.pages import KV_DTYPES, Pages
from herd.engine.prefix import Chain
from herd.engine.sampler import Sampler
from herd.engine.sequence import Sequence
from herd.model.config import ModelConfig
from herd.model.presets import CRIA, GUARD, MAVERICK, SCOUT, TINY
from herd.model.size import KV_KINDS, kv_bytes, record_bytes
from herd.ops.native import kernels
from herd.text.prompt import Prompt
from herd.text.stream import Detokenizer
from herd.text.tokenizer import byte_tokenizer
from tests.engine.made import blocks_model

CASES = {
    "scout": (SCOUT, 131_072),
    "scout, within a chunk": (SCOUT, 5000),
    "maverick": (MAVERICK, 100_001),
    "guard": (GUARD, 16_384),
    "cria": (CRIA, 8192),
    "tiny": (TINY, 1024),
    "tiny, all global": (replace(TINY, global_step=1), 1000),
}


def filled(model: ModelConfig, config: EngineConfig, num_tokens: int) -> tuple[Pages, int]:
    """Pages without numbers that one sequence has filled, and the bytes of Python's objects that this took."""
    sequence = Sequence(
        prompt=Prompt(tokens=[i % 251 for i in range(num_tokens)], loss_mask=[]),
        sampler=Sampler(Sampling(temperature=0, top_p=1)),
        detokenizer=Detokenizer(byte_tokenizer(), ()),
        stop_ids=frozenset(),
        max_reply=1,
        patches=[],
        chain=Chain(page_tokens=config.page_tokens),
        lookup=Lookup(0),
        emit=lambda event: None,
    )
    tracemalloc.start()
    pages = Pages(model, config, dtype=KV_DTYPES[config.kv], device=torch.device("meta"))
    while sequence.num_computed < num_tokens:
        stop = min(num_tokens, pages.chunk_start(sequence.num_computed) + (model.chunk_tokens or num_tokens), sequence.num_computed + 512)
        assert pages.grow(sequence, stop)
        pages.computed(sequence, stop)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return pages, used


@pytest.mark.parametrize("kv", KV_KINDS)
@pytest.mark.parametrize("name", CASES)
def test_pages_take_what_inspect_says(name: str, kv: str) -> None:
    """To 2 %, the records of pages included: for one sequence as long as the context."""
    model, tokens = CASES[name]
    config = EngineConfig(kv_gib=1e4, context_tokens=tokens, max_sequences=1, kv=kv)  # type: ignore[arg-type]
    pages, records = filled(model, config, tokens)
    held = sum(tensor.nbytes for slots in pages.layers for tensor in slots.tensors)
    said = kv_bytes(model, tokens, kv)
    assert held == pytest.approx(said, rel=0.02)
    assert held + records == pytest.approx(said + record_bytes(model, tokens), rel=0.02)
    if model.width > 1000:
        assert records < 0.001 * held
    assert pages.full.room == 0 or not model.global_layers


@pytest.mark.skipif(not Path("/proc/self/status").exists() or kernels() is None, reason="needs Linux's /proc and the native kernels")
@pytest.mark.parametrize("kv", KV_KINDS)
def test_memory_grows_as_inspect_says(kv: str) -> None:
    """Resident memory, as the system counts it, from the second chunk of a long prompt to its end: to 5 %."""
    config = replace(
        TINY, width=128, num_heads=8, num_kv_heads=8, head_width=128, dense_width=96, num_experts=0, num_layers=4, chunk_tokens=128,
        vision=None, context_tokens=1 << 16,
    )  # fmt: skip
    # room for far more: tensors of over 32 MiB, which malloc never makes of memory that something else has left resident
    choices = EngineConfig(kv_gib=2, max_sequences=1, step_tokens=128, draft_tokens=0, kv=kv)  # type: ignore[arg-type]
    engine = Engine(blocks_model(config), byte_tokenizer(), choices)
    prompt = Prompt(tokens=[i % 251 for i in range(1920)], loss_mask=[False] * 1920)
    sequence = engine.sequence(prompt, Sampling(temperature=0, max_tokens=2, ignore_eos=True), lambda event: None)
    engine.scheduler.add(sequence)
    engine.step()
    gc.collect()  # what earlier tests left must not go in the middle
    hand_back()
    engine.step()
    before = resident()
    while sequence.num_computed < 1920:
        engine.step()
    grown = resident() - before
    said = kv_bytes(config, 1920, kv) - kv_bytes(config, 256, kv) + record_bytes(config, 1920) - record_bytes(config, 256)
    assert grown == pytest.approx(said, rel=0.05, abs=256 << 10)


def resident() -> int:
    """Bytes of this process that are in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
