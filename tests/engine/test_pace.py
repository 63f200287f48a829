"""Pacing by a clock that the test turns: replies keep their speed while prompts come in, and every prompt gets on."""

import random
from dataclasses import dataclass, field
from typing import Any

import pytest

from herd.chat import Sampling
from herd.engine.config import EngineConfig
from herd.engine.engine import Engine
from herd.engine.local import Model
from herd.engine.pace import LEAST_TOKENS, Pace
from herd.engine.scheduler import Plan
from herd.engine.sequence import Sequence
from herd.errors import UsageError

from .greedy import greedy_reply
from .test_engine import random_prompt


@dataclass
class Machine:
    """Stands in for a runner whose steps take a known time: `decode_s` where something decodes, `token_s` for each prompt token."""

    runner: Any
    decode_s: float
    token_s: float
    noise: random.Random | None = None
    now: float = 0.0
    steps: list[tuple[bool, int, float]] = field(default_factory=list)  # (something decodes, prompt tokens, seconds)

    def see(self, plan: Plan) -> None:
        decodes, prompt = any(piece.is_decoding for piece in plan.pieces), plan.prompt_tokens
        seconds = self.decode_s * decodes + self.token_s * prompt
        self.steps.append((decodes, prompt, seconds * (self.noise.uniform(0.8, 1.3) if self.noise else 1)))

    def __call__(self, inputs: Any) -> Any:
        self.now += self.steps[-1][2]
        return self.runner(inputs)


def paced(tiny: Model, decode_s: float, token_s: float, noise: random.Random | None = None, **choices: Any) -> tuple[Engine, Machine]:
    config = EngineConfig(**{"page_tokens": 4, "kv_gib": 0.05, **choices})
    engine = Engine(tiny.llama4, tiny.tokenizer, config, clock=lambda: machine.now)
    machine = Machine(engine.runner, decode_s, token_s, noise)
    engine.runner = machine  # type: ignore[assignment]
    return engine, machine


def add(engine: Engine, rng: random.Random, length: int, max_tokens: int = 4) -> Sequence:
    sequence = engine.sequence(
        random_prompt(rng, length), Sampling(temperature=0, max_tokens=max_tokens, ignore_eos=True), lambda event: None
    )
    engine.scheduler.add(sequence)
    return sequence


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("pace", [0.5, 0.7, 0.9])
def test_replies_keep_their_share_while_a_long_prompt_comes_in(tiny: Model, pace: float, noisy: bool) -> None:
    rng = random.Random(0)
    engine, machine = paced(tiny, 0.010, 0.0002, rng if noisy else None, pace=pace)
    add(engine, rng, 5, max_tokens=900)
    for _ in range(20):
        engine.step()
    machine.steps.clear()
    long = add(engine, rng, 700)
    while long.num_waiting > 1:
        engine.step()
    assert all(decodes for decodes, _, _ in machine.steps)
    seconds = sum(s for _, _, s in machine.steps) / len(machine.steps)
    assert 0.010 / seconds > pace * (0.85 if noisy else 0.99)
    assert long.num_computed == 700


def test_without_a_pace_a_prompt_takes_the_step(tiny: Model) -> None:
    rng = random.Random(0)
    engine, machine = paced(tiny, 0.001, 0.01, pace=0, step_tokens=64)
    add(engine, rng, 5, max_tokens=200)
    for _ in range(5):
        engine.step()
    add(engine, rng, 12)
    engine.step()
    assert machine.steps[-1][:2] == (True, 12)


def test_prompts_get_on_whatever_they_cost(tiny: Model) -> None:
    rng = random.Random(1)
    engine, machine = paced(tiny, 0.001, 0.1)
    add(engine, rng, 5, max_tokens=200)
    for _ in range(10):
        engine.step()
    long = add(engine, rng, 60)
    machine.steps.clear()
    while long.num_waiting > 1:
        engine.step()
    assert len(machine.steps) <= 60 // LEAST_TOKENS + 60 // 16, "borders of the chunk of 16 cut pieces short"
    assert max(tokens for _, tokens, _ in machine.steps) == LEAST_TOKENS


def test_of_many_prompts_the_first_and_the_shortest_get_on(tiny: Model) -> None:
    """A long prompt and then short ones: each step gives tokens to the first, and the short ones are through long before it."""
    rng = random.Random(2)
    engine, _ = paced(tiny, 0.001, 0.001, step_tokens=16)
    long = add(engine, rng, 400)
    engine.step()
    short = [add(engine, rng, 30) for _ in range(3)]
    while not all(s.finish for s in short):
        before = long.num_computed
        engine.step()
        assert long.num_computed > before
    assert long.num_waiting > 250


def test_a_prompt_waits_for_the_page_that_is_computed_for_another(tiny: Model) -> None:
    """Eight of the same prompt at once cost little more than one."""
    rng = random.Random(3)
    engine, machine = paced(tiny, 0.001, 0.001, step_tokens=32)
    first = add(engine, rng, 200)
    others = [engine.sequence(first.prompt, first.sampler.sampling, lambda event: None) for _ in range(7)]
    for sequence in others:
        engine.scheduler.add(sequence)
    while not engine.scheduler.is_idle:
        engine.step()
    assert sum(tokens for _, tokens, _ in machine.steps) < 200 + 8 * 8
    want = greedy_reply(tiny, first.prompt, 1)
    assert all(s.tokens[200:201] == want and s.num_cached == 196 for s in others)


def test_the_fit_finds_what_steps_cost() -> None:
    rng = random.Random(4)
    pace = Pace(0.5)
    pace.saw(False, 500, 30.0)  # the first step compiles something
    for _ in range(100):
        tokens = rng.choice([0, 0, 10, 40])
        pace.saw(True, tokens, 0.02 + 0.001 * tokens)
    assert abs(pace.decode_s - 0.02) < 1e-3 and abs(pace.token_s - 0.001) < 1e-4
    assert abs(pace.prompt_tokens(512) - 20) <= 2
    for _ in range(300):  # all alike: the two cannot be told apart, and what was known stays
        pace.saw(True, 20, 0.04)
    assert abs(pace.decode_s - 0.02) < 4e-3 and abs(pace.token_s - 0.001) < 2e-4
    for _ in range(300):
        tokens = rng.choice([0, 5, 20])
        pace.saw(True, tokens, 0.1 + 0.01 * tokens)
    assert abs(pace.decode_s - 0.1) < 5e-3 and abs(pace.token_s - 0.01) < 5e-4


def test_a_pace_that_cannot_be_is_refused() -> None:
    for pace in (-0.1, 1.1):
        with pytest.raises(UsageError, match="pace"):
            EngineConfig(pace=pace)
