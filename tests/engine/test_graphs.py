"""Decoding by recorded graphs, on the CPU: recorded by a tracer, which freezes what a CUDA graph would freeze, and replayed."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from herd.engine.graphs import Forward, Graphs, Record
from herd.model.config import ModelConfig
from herd.model.init import init_weights
from herd.model.llama4 import build
from herd.model.presets import TINY
from tests.engine.made import logits_of, start

SCOUT = replace(TINY, vision=None)
FAMILY = {
    "scout": SCOUT,
    "maverick": replace(SCOUT, moe_step=2, qk_norm=False, rope_scaling=None),
    "dense": replace(SCOUT, num_experts=0, global_step=None, temperature_tuning=False, tied=True),
    "unlimited": replace(SCOUT, chunk_tokens=None),
    "global": replace(SCOUT, global_step=1),
}


def traced(forward: Forward, buffers: list[Tensor]) -> Callable[[], Tensor]:
    """The operations on tensors and nothing else: Python's decisions and numbers stay as they were, and asking a tensor for one fails."""
    with torch.no_grad():
        graph = make_fx(forward)(*buffers)
    return lambda: graph(*buffers)


def stale(forward: Forward, buffers: list[Tensor]) -> Callable[[], Tensor]:
    """The same with the tables of slots as they were when it was recorded."""
    tables = [buffer.clone() for buffer in buffers[4:]]
    return traced(lambda *rest: forward(*rest, *tables), buffers[:4])


def greedy(config: ModelConfig, lengths: list[int], record: Record | None) -> tuple[list[Tensor], int]:
    """The logits of 40 tokens of each sequence, and how many graphs were recorded for them; by the plain forward without `record`."""
    model = init_weights(build(config, device="cpu"), 0, std=0.15)
    rng = random.Random(0)
    engine, sequences = start(model, [[rng.randrange(256) for _ in range(n)] for n in lengths], max_tokens=40)
    assert engine.runner.graphs is None, "no CUDA graphs on a CPU"
    recorded: list[Forward] = []

    def counted(forward: Forward, buffers: list[Tensor]) -> Callable[[], Tensor]:
        assert record is not None
        recorded.append(forward)
        return record(forward, buffers)

    engine.runner.graphs = Graphs(model, engine.pages, counted) if record else None
    return [torch.stack(rows) for rows in logits_of(engine, sequences, None).values()], len(recorded)


@pytest.mark.parametrize("name", FAMILY)
def test_replayed_equals_computed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over two borders of the chunk of 16, in a batch of three, which repeats a row to be four."""
    monkeypatch.setattr("herd.engine.graphs.LEAST_COLUMNS", 16)
    found, num_graphs = greedy(FAMILY[name], [3, 14, 30], traced)
    want, _ = greedy(FAMILY[name], [3, 14, 30], None)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert 1 <= num_graphs <= 5, "one for each power of two that the sequences reached, not one for each step"


def test_one_sequence() -> None:
    found, num_graphs = greedy(SCOUT, [5], traced)
    torch.testing.assert_close(found[0], greedy(SCOUT, [5], None)[0][0], atol=1e-4, rtol=1e-4)
    assert num_graphs == 1


def test_tables_that_stay_as_they_were_recorded_are_found_out() -> None:
    found, _ = greedy(SCOUT, [5], stale)
    assert (found[0] - greedy(SCOUT, [5], None)[0][0]).abs().max() > 0.1
