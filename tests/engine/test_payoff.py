"""What guesses are worth: the cost of steps recovered, and as many guesses as give the most tokens per second."""

import random

import pytest

from herd.engine.payoff import MOST_PRICE, Payoff


def seen(step_s: float, token_s: float, rng: random.Random, noise: float = 0.0, tokens: tuple[int, ...] = (1, 2, 4, 9, 16)) -> Payoff:
    payoff = Payoff()
    for _ in range(200):
        count = rng.choice(tokens)
        payoff.saw(count, (step_s + token_s * count) * (1 + noise * rng.uniform(-1, 1)))
    return payoff


@pytest.mark.parametrize(("step_s", "token_s"), [(3e-3, 1e-3), (20e-3, 1e-4), (1e-4, 2e-3)])
def test_costs_are_found(step_s: float, token_s: float) -> None:
    payoff = seen(step_s, token_s, random.Random(0))
    assert payoff.step_s == pytest.approx(step_s, rel=0.02, abs=1e-5)
    assert payoff.token_s == pytest.approx(token_s, rel=0.02, abs=1e-5)
    noisy = seen(step_s, token_s, random.Random(1), noise=0.2)
    assert noisy.price(1, 1) == pytest.approx(payoff.price(1, 1), rel=0.4, abs=0.03)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_steps_that_are_alike_keep_what_was_known(factor: float) -> None:
    """A machine that slowly gets faster or slower: alone they would not tell what a token costs."""
    payoff = seen(3e-3, 1e-3, random.Random(0))
    for i in range(1000):
        payoff.saw(1, 4e-3 * factor ** (min(i, 900) / 900))
    assert payoff.step_s + payoff.token_s == pytest.approx(4e-3 * factor, rel=0.02)
    assert 0.15 < payoff.price(1, 1) < 0.4


def test_guesses_give_the_most_tokens_per_second() -> None:
    rng = random.Random(2)
    for _ in range(300):
        step_s, token_s = 10 ** rng.uniform(-4, -1), 10 ** rng.uniform(-5, -2)
        payoff = Payoff()
        payoff.step_s, payoff.token_s = step_s, token_s
        chance, others, most = rng.uniform(0.05, 0.99), rng.randrange(16), rng.randrange(12)

        def rate(count: int, chance: float = chance, others: int = others, step_s: float = step_s, token_s: float = token_s) -> float:
            tokens = others + 1 + sum(chance**i for i in range(1, count + 1))
            return tokens / (step_s + token_s * (others + 1 + count))

        best = max(range(most + 1), key=rate)
        found = payoff.drafts(chance, others, most)
        if payoff.price(others + 1, others + 1) < MOST_PRICE:
            assert rate(found) == pytest.approx(rate(best), rel=1e-9)


def test_nothing_known_takes_only_what_is_almost_sure() -> None:
    assert Payoff().drafts(0.5, 0, 8) == 0
    assert Payoff().drafts(0.99, 0, 8) > 0
    payoff = Payoff()
    payoff.saw(0, 1.0)
    payoff.saw(3, 0.0)
    assert payoff.step_s == payoff.token_s == 0
