"""Sampling: each step by hand, frequencies, and independence of seeds."""

import pytest
import torch

from herd.chat import Sampling
from herd.engine.sampler import Sampler
from herd.errors import HerdError, UsageError
from herd.ops import sample


def kept(logits: list[float], **fields: float) -> dict[int, float]:
    draw = sample.Draw(**{"temperature": 1.0, "point": 0.0, **fields})  # type: ignore[arg-type]
    weights, ids = sample.kept(torch.tensor(logits), draw)
    return dict(zip(ids.tolist(), (weights / weights.sum()).tolist(), strict=True))


LOGITS = torch.tensor([0.1, 0.5, 0.15, 0.25]).log().tolist()


def test_without_limits_it_is_softmax() -> None:
    assert kept(LOGITS) == pytest.approx({1: 0.5, 3: 0.25, 2: 0.15, 0: 0.1})


def test_temperature_sharpens() -> None:
    assert kept(LOGITS, temperature=0.5)[1] == pytest.approx(0.25 / (0.25 + 0.0625 + 0.0225 + 0.01))


def test_top_k() -> None:
    assert kept(LOGITS, top_k=2) == pytest.approx({1: 2 / 3, 3: 1 / 3})


@pytest.mark.parametrize(("top_p", "ids"), [(0.0, {1}), (0.49, {1}), (0.51, {1, 3}), (0.76, {1, 3, 2}), (1.0, {0, 1, 2, 3})])
def test_top_p_keeps_the_token_that_crosses(top_p: float, ids: set[int]) -> None:
    assert set(kept(LOGITS, top_p=top_p)) == ids


def test_min_p_is_relative_to_the_likeliest() -> None:
    assert set(kept(LOGITS, min_p=0.4)) == {1, 3}


def test_top_p_sees_what_top_k_left() -> None:
    """As in transformers: each step renormalises. Of {0.5, 0.25} the first alone has 0.67."""
    assert set(kept(LOGITS, top_k=2, top_p=0.6)) == {1}


@pytest.mark.parametrize(
    "fields", [{}, {"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.1}, {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02}]
)
def test_equals_transformers(fields: dict[str, float]) -> None:
    from transformers import LogitsProcessorList, MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(50, generator=torch.Generator().manual_seed(1)) * 2
    steps = LogitsProcessorList([TemperatureLogitsWarper(float(fields.get("temperature", 1.0)))])
    if "top_k" in fields:
        steps.append(TopKLogitsWarper(int(fields["top_k"])))
    if "top_p" in fields:
        steps.append(TopPLogitsWarper(fields["top_p"]))
    if "min_p" in fields:
        steps.append(MinPLogitsWarper(fields["min_p"]))
    want = steps(torch.zeros(1, 1, dtype=torch.int64), logits[None].double())[0].softmax(-1)
    got = torch.zeros(50, dtype=torch.float64)
    for token, p in kept(logits.tolist(), **fields).items():
        got[token] = p
    assert torch.allclose(got, want, atol=1e-9)


def test_frequencies() -> None:
    sampler = Sampler(Sampling(temperature=1.0, top_p=1.0, seed=3))
    draws = torch.tensor([sampler(torch.tensor(LOGITS)) for _ in range(4000)]).bincount(minlength=4) / 4000
    assert torch.allclose(draws, torch.tensor(LOGITS).exp(), atol=0.03)


def test_greedy_takes_the_lowest_id_on_a_tie() -> None:
    assert Sampler(Sampling(temperature=0, top_p=1.0))(torch.tensor([0.0, 2.0, 2.0])) == 1


def test_same_seed_same_draws() -> None:
    logits = torch.randn(100)
    one, two, other = (Sampler(Sampling(temperature=1.0, top_p=1.0, seed=seed)) for seed in (5, 5, 6))
    draws = [[s(logits) for _ in range(50)] for s in (one, two, other)]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -0.1), ("temperature", 2.1), ("top_p", 1.5), ("top_k", -1), ("min_p", 2), ("max_tokens", 0), ("stop", ("",))],
)
def test_out_of_range_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(UsageError, match=field):
        Sampling(**{field: value})  # type: ignore[arg-type]


def test_a_temperature_next_to_nothing_is_greedy() -> None:
    logits = torch.randn(50)
    for temperature in (1e-6, 1e-300, 1e-320):
        assert Sampler(Sampling(temperature=temperature, top_p=1.0))(logits) == logits.argmax()


def test_logits_that_are_no_numbers_are_refused() -> None:
    for temperature in (0, 1.0):
        with pytest.raises(HerdError, match="NaN"):
            Sampler(Sampling(temperature=temperature, top_p=1.0))(torch.tensor([0.0, float("nan"), 1.0]))
