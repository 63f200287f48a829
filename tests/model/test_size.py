"""Sizes that `herd inspect` shows, against the published sizes of files and arithmetic done apart.

Source of the totals of parameters: arithmetic from the released configs, confirmed by the sizes of Meta's files and by the model card.
"""

from math import prod

import pytest

from herd.checkpoint.names import herd_shapes
from herd.model.presets import BEHEMOTH, CRIA, GUARD, MAVERICK, SCOUT, preset
from herd.model.size import kv_bytes, parameters, weight_bytes
from herd.quant.fp8 import plan

VISION = 871_932_416


@pytest.mark.parametrize(
    ("name", "text", "active"),
    [
        ("scout", 107_769_861_120, 17_172_894_720),
        ("maverick", 400_711_848_960, 17_184_691_200),
        ("guard", 12_001_097_216 - VISION, 12_001_097_216 - VISION),  # dense: every parameter is active
    ],
)
def test_parameters(name: str, text: int, active: int) -> None:
    size = parameters(preset(name))
    assert (size.text, size.vision, size.active, size.total) == (text, VISION, active, text + VISION)


def test_behemoth_has_the_three_published_numbers() -> None:
    size = parameters(BEHEMOTH)
    assert BEHEMOTH.num_experts == 16
    assert size.active == pytest.approx(288e9, rel=0.01)
    assert 1.9e12 <= size.text <= 2.0e12


def test_what_a_quantized_file_holds_in_fewer_bits() -> None:
    """int4: all matrices of the layers but the router: attention, experts, shared expert. fp8: the same without attention."""
    attention, expert = 62_914_560, 125_829_120
    assert parameters(SCOUT).quantized == 48 * (attention + 17 * expert)
    assert parameters(MAVERICK).quantized == 48 * attention + 24 * (129 * expert + 2 * expert)
    assert parameters(GUARD).quantized == 48 * (attention + expert)
    for config in (SCOUT, MAVERICK, GUARD):
        size = parameters(config)
        assert size.feed_forward == size.quantized - 48 * attention
        shapes = herd_shapes(config)
        assert size.feed_forward == sum(prod(shapes[name]) for name in plan(shapes))


def test_weight_bytes() -> None:
    scout = parameters(SCOUT)
    assert weight_bytes(scout, "bf16") == 2 * 108_641_793_536
    assert weight_bytes(scout, "fp8") == scout.feed_forward + 2 * (scout.total - scout.feed_forward)
    assert weight_bytes(scout, "int4") == pytest.approx(65e9, rel=0.02), "fits on one 80 GB GPU, as the model card says"


@pytest.mark.parametrize(("tokens", "gib"), [(131_072, 7.125), (1_048_576, 49.125), (10_485_760, 481.125)])
def test_kv_bytes_with_chunks_let_go(tokens: int, gib: float) -> None:
    for config in (SCOUT, MAVERICK):
        assert kv_bytes(config, tokens) == gib * 2**30
        assert kv_bytes(config, tokens, "int8") == gib * 2**30 * (128 + 4) / 256, "a byte for each, and a scale for each head's 128"


def test_kv_bytes_within_one_chunk_and_without_chunks() -> None:
    assert kv_bytes(SCOUT, 100) == 100 * 48 * 4096
    assert kv_bytes(GUARD, 100_000) == 100_000 * 48 * 4096
    assert kv_bytes(CRIA, 8192, "fp32") == 8192 * 30 * 2 * 3 * 64 * 4
