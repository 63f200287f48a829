"""Sampling: each step by hand, frequencies, and independence of seeds."""

from typing import Any

import pytest
import torch

from herd.chat import Sampling
from herd.engine.local import Model
from herd.engine.sampler import Penalties, Sampler
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


def sampler(prompt: tuple[int, ...] = (), **fields: Any) -> Sampler:
    return Sampler(Sampling(**{"temperature": 0, "top_p": 1.0, **fields}), prompt)


def test_presence_and_frequency_are_openais_formula() -> None:
    """mu - count * frequency - (count > 0) * presence, of the reply's tokens and not the prompt's."""
    one = sampler((1, 2), presence_penalty=0.5, frequency_penalty=0.25)
    logits = torch.tensor([1.0, 0.9, 0.8, 0.0])
    drawn, counts = [], [0] * 4
    for _ in range(8):
        want = max(range(4), key=lambda i: (logits[i].item() - counts[i] * 0.25 - (counts[i] > 0) * 0.5, -i))
        drawn.append(one(logits))
        assert drawn[-1] == want
        counts[want] += 1
    assert drawn[:3] == [0, 1, 2]
    assert logits.tolist() == pytest.approx([1.0, 0.9, 0.8, 0.0])  # the caller's logits are left alone


def test_repetition_is_as_in_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = torch.randn(40, generator=torch.Generator().manual_seed(1))
    seen = [3, 5, 5, 7]
    penalties = Penalties(Sampling(repetition_penalty=1.7), (3, 5))
    for token in (5, 7):
        penalties.count(token)
    found = logits.clone()
    penalties.apply(found)
    assert torch.equal(found, RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([seen]), logits[None].clone())[0])


def test_many_tokens_are_counted() -> None:
    penalties = Penalties(Sampling(frequency_penalty=0.5), ())
    tokens = torch.randint(0, 300, (2000,), generator=torch.Generator().manual_seed(1))
    for token in tokens.tolist():
        penalties.count(token)
    logits = torch.zeros(300)
    penalties.apply(logits)
    assert torch.equal(logits, -0.5 * tokens.bincount(minlength=300))


def test_logit_bias() -> None:
    logits = torch.tensor([1.0, 2.0, 3.0])
    assert sampler(logit_bias={2: -100, 0: 5.5})(logits) == 0
    assert sampler(logit_bias={1: 1.5})(logits) == 1
    draws = [sampler(logit_bias={0: 100.0}, temperature=1.0, seed=seed)(logits) for seed in range(20)]
    assert draws == [0] * 20


def test_log_probabilities_are_the_models_own() -> None:
    """Before temperature, penalties and bias."""
    logits = torch.randn(50, generator=torch.Generator().manual_seed(2))
    one = sampler(temperature=1.3, top_k=3, seed=1, logprobs=4, logit_bias={7: 60.0}, presence_penalty=1.0)
    tokens = one.draw(logits[None])
    own = logits.log_softmax(0)
    ((logprob, top),) = one.told
    assert tokens == [7] and logprob == pytest.approx(own[7].item(), abs=1e-5)
    assert [token for token, _ in top] == own.argsort(descending=True)[:4].tolist()
    assert [value for _, value in top] == pytest.approx(own.sort(descending=True)[0][:4].tolist(), abs=1e-5)
    zero = sampler(logprobs=0)
    zero(logits)
    assert zero.told[0][1] == []


def test_drafts_change_nothing_where_tokens_are_counted() -> None:
    rows = torch.randn(6, 30, generator=torch.Generator().manual_seed(3))
    fields: dict[str, Any] = {"temperature": 1.0, "seed": 4, "presence_penalty": 1.5, "repetition_penalty": 1.3}
    one, other = sampler(**fields), sampler(**fields)
    alone = [one(row) for row in rows]
    assert other.draw(rows, alone[:5]) == alone


def test_log_probabilities_of_a_reply(tiny: Model) -> None:
    reply = tiny.generate("hello", temperature=0, max_tokens=8, logprobs=2).whole
    assert reply.done
    tokens = [one.token for one in reply.drawn]
    assert tokens == [token for token in reply.done.tokens if token not in tiny.config.stop_ids]
    start = [tiny.config.bos_id or 0, *b"hello"]
    own = tiny.logits([*start, *tokens]).log_softmax(-1)[len(start) - 1 :]
    for place, one in enumerate(reply.drawn):
        assert one.logprob == pytest.approx(own[place, one.token].item(), abs=1e-4)
        assert one.data == tiny.tokenizer.token_bytes(one.token)
        assert one.top[0].token == one.token and len(one.top) == 2  # greedy


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("presence_penalty", 2.5),
        ("frequency_penalty", "a"),
        ("repetition_penalty", 0),
        ("logprobs", 21),
        ("logprobs", True),
        ("logit_bias", {1: 101}),
        ("logit_bias", {-1: 1}),
        ("logit_bias", {"1": 1}),
        ("logit_bias", [1]),
    ],
)
def test_other_fields_out_of_range_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(UsageError, match=field) as caught:
        Sampling(**{field: value})  # type: ignore[arg-type]
    assert caught.value.param == field


def test_a_bias_for_a_token_that_is_none(tiny: Model) -> None:
    with pytest.raises(UsageError, match="logit_bias has token 512; the vocabulary has 512"):
        tiny.generate("x", logit_bias={512: 1})
