"""The table of ways: whole, true of this machine, and what calls are dispatched from."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from herd.ops import pick
from herd.ops.int4 import Kind, blocks_linear_plain
from herd.ops.native import kernels
from herd.ops.pick import OPS, TABLE, blocks_linear, choose, grouped_linear, holds_blocks, ways
from tests.ops.test_int4 import packed

ROOT = Path(__file__).parents[2]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def test_the_table_is_whole() -> None:
    """Every op ends with its definition, which takes everything; every file is there; a condition is said in words too."""
    assert list(OPS) == list(dict.fromkeys(way.op for way in TABLE))
    for op in OPS:
        *_, last = rows = [way for way in TABLE if way.op == op]
        assert last.is_plain and not (last.devices or last.dtypes or last.needs or last.takes or last.only)
        assert len({way.run is None for way in rows}) == 1
    for way in TABLE:
        assert (ROOT / way.home).exists(), way.home
        assert way.run is None or bool(way.takes) == bool(way.only)


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_there_is_a_way_everywhere(device: str) -> None:
    for op in OPS:
        for dtype in DTYPES:
            assert ways(op, device, dtype)[-1].is_plain


def test_calls_are_dispatched_from_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def watched(way: pick.Way) -> pick.Way:
        return replace(way, run=lambda *args: (seen.append(way.name), way.run(*args))[1] if way.run else None)

    monkeypatch.setattr(pick, "TABLE", tuple(map(watched, TABLE)))
    monkeypatch.setattr(pick, "ways", pick.ways.__wrapped__)
    blocks, x = packed(Kind(4, 32), (16, 64)), torch.randn(3, 64)
    assert blocks_linear(x, blocks).dtype == torch.float32
    for width, dtype in ((8, torch.float32), (6, torch.float32), (8, torch.float64)):
        grouped_linear(torch.randn(3, width, dtype=dtype), torch.randn(2, 16, width, dtype=dtype), torch.tensor([1, 2]))
    assert seen == ["native" if kernels() else "plain", "grouped_mm", "loop", "loop"]


def test_without_the_native_kernels_blocks_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pick, "kernels", lambda: None)
    monkeypatch.setattr(pick, "ways", pick.ways.__wrapped__)
    assert choose("blocks", "cpu", torch.float32).name == "plain" and not holds_blocks("cpu", torch.float32)
    blocks, x = packed(Kind(4, 32), (2, 16, 64)), torch.randn(3, 64)
    want = torch.cat([blocks_linear_plain(x[:1], blocks[0]), blocks_linear_plain(x[1:], blocks[1])])
    assert torch.equal(blocks_linear(x, blocks, torch.tensor([1, 2])), want)


@pytest.mark.parametrize(
    ("capability", "names"), [((7, 5), ["dequantized", "loop"]), ((8, 0), ["triton", "loop"]), ((9, 0), ["triton", "grouped_mm"])]
)
def test_what_a_gpu_would_take(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], names: list[str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
    monkeypatch.setattr(pick, "find_spec", lambda name: object())
    monkeypatch.setattr(pick, "ways", pick.ways.__wrapped__)
    weight = torch.empty(2, 16, 16, dtype=torch.bfloat16)
    blocks = choose("blocks", "cuda", torch.bfloat16)
    experts = choose("experts", "cuda", torch.bfloat16, None, weight, None)
    assert [blocks.name, experts.name] == names
    assert holds_blocks("cuda", torch.bfloat16) is (blocks.name == "triton")
    assert experts.waits is (experts.name == "loop")
