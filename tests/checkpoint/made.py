"""Checkpoints made for tests: configs that every format can hold, weights in which each number tells where it belongs."""

from dataclasses import replace
from pathlib import Path

import torch

from herd.checkpoint.source import Source, held, of_model
from herd.model.config import ModelConfig, RopeScaling, VisionConfig
from herd.model.llama4 import build
from herd.text.tokenizer import byte_tokenizer

# Eight shards fit: every head count and every width divides by 8.
VISION = VisionConfig(width=32, num_layers=2, num_heads=8, hidden_width=128, tile_pixels=24, patch_pixels=4, adapter_width=24)

SCOUT = ModelConfig(
    width=48,
    num_layers=4,
    num_heads=16,
    num_kv_heads=8,
    head_width=8,
    vocab_size=288,
    hidden_width=24,
    dense_width=56,
    num_experts=3,
    chunk_tokens=16,
    rope_scaling=RopeScaling(),
    qk_norm=True,
    temperature_floor=8,
    bos_id=256,
    stop_ids=(257, 260, 261),
    pad_id=262,
    patch_id=268,
    vision=VISION,
)

MAVERICK = replace(SCOUT, num_experts=5, moe_step=2, rope_scaling=None, qk_norm=False, experts_per_token=2)
DENSE = replace(SCOUT, num_experts=0, global_step=None, chunk_tokens=None, vision=None, hidden_width=56)
# What llama.cpp can compute: chunk and temperature of the released models, QK norm unless there are 128 experts, text only.
LLAMACPP = replace(
    SCOUT,
    width=64,
    num_heads=4,
    num_kv_heads=2,
    head_width=16,
    hidden_width=96,
    dense_width=128,
    chunk_tokens=8192,
    temperature_floor=8192,
    moe_step=2,
    vision=None,
)

# Every width divides into blocks of 32 and of 128 columns, those of the eyes apart.
WIDE = replace(LLAMACPP, width=128, head_width=32, hidden_width=128, dense_width=256)

FAMILY = {"scout": SCOUT, "maverick": MAVERICK, "dense": DENSE}


def indexed(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Source:
    """A source whose every value is different, exactly representable in float32: a swap of any two shows."""
    tensors, first = {}, 0
    for name, tensor in build(config).state_dict().items():
        tensors[name] = held(torch.arange(first, first + tensor.numel(), dtype=torch.float32).reshape(tensor.shape).to(dtype))
        first += tensor.numel()
    assert first < 2**24, "float32 counts no further without gaps"
    return Source(config=config, tensors=tensors, files=byte_tokenizer().files(), kind="memory")


def random_source(config: ModelConfig, seed: int = 0) -> Source:
    """A source with random weights and the byte tokenizer."""
    from tests.model.small import random_model

    return of_model(random_model(config, seed), byte_tokenizer().files())


def assert_same(a: Source, b: Source) -> None:
    """Equal bit for bit: the same tensors in the same order, shapes, dtypes, values and blocks."""
    assert list(a.tensors) == list(b.tensors)
    for name, stored in a.tensors.items():
        other = b.tensors[name]
        assert (stored.shape, stored.dtype) == (other.shape, other.dtype), name
        assert torch.equal(stored.read(), other.read()), name
        if other.view is not None:
            assert torch.equal(stored.read(), other.view()), name
        assert stored.kind == other.kind, name
        if stored.blocks is not None and other.blocks is not None:
            assert torch.equal(stored.blocks.read(), other.blocks.read()), name


def entries(folder: Path) -> list[str]:
    """The names in a folder."""
    return sorted(path.name for path in folder.iterdir())
