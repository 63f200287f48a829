"""Pacing by a clock that the test turns: replies keep their speed while prompts come in, and every prompt gets on."""

import random
import statistics
from dataclasses import dataclass, field
from typing import Any

import pytest

from herd.chat import Sampling
from herd.engine.config import EngineConfig
from herd.engine.engine import Engine
from herd.engine.local import Model
from herd.engine.pace import ALONE, LEAST_EARNED, LONGEST, SAVED, Pace
from herd.engine.scheduler import Plan
from herd.engine.sequence import Sequence
from herd.errors import UsageError
from tests.engine.made import random_prompt

from .greedy import greedy_reply


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
        decodes, prompt = any(piece.is_decoding for piece in plan.pieces), sum(p.stop - p.start for p in plan.prompts)
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


def seconds_of(machine: Machine) -> float:
    return sum(seconds for _, _, seconds in machine.steps)


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("pace", [0.5, 0.7, 0.9])
def test_replies_keep_their_share_while_a_long_prompt_comes_in(tiny: Model, pace: float, noisy: bool) -> None:
    """All but what was saved up before; with noise of -20 to +30 % what decoding takes is known to a few per cent."""
    rng = random.Random(0)
    engine, machine = paced(tiny, 0.010, 0.001, rng if noisy else None, pace=pace)
    add(engine, rng, 5, max_tokens=1000)
    for _ in range(20):
        engine.step()
    machine.steps.clear()
    long = add(engine, rng, 500)
    while long.num_waiting > 1:
        engine.step()
    assert all(decodes for decodes, _, _ in machine.steps)
    decode_s = 0.010 * (1.05 if noisy else 1)
    assert seconds_of(machine) <= (len(machine.steps) / pace + SAVED * (LONGEST - 1)) * decode_s * (1.05 if noisy else 1)
    assert max(seconds for _, _, seconds in machine.steps) <= (5 if noisy else 1 + (LONGEST - 1) * 4 / 3) * 0.010
    assert long.num_computed == 500


def test_without_a_pace_a_prompt_takes_the_step(tiny: Model) -> None:
    rng = random.Random(0)
    engine, machine = paced(tiny, 0.001, 0.01, pace=0, step_tokens=64)
    add(engine, rng, 5, max_tokens=200)
    for _ in range(5):
        engine.step()
    add(engine, rng, 12)
    engine.step()
    assert machine.steps[-1][:2] == (True, 12)


@pytest.mark.parametrize("pace", [0.7, 1])
def test_prompts_get_on_whatever_they_cost(tiny: Model, pace: float) -> None:
    """A token takes ten times as long as decoding: they come one by one, as soon as time for one was earned."""
    rng = random.Random(1)
    engine, machine = paced(tiny, 0.001, 0.01, pace=pace)
    add(engine, rng, 5, max_tokens=900)
    for _ in range(10):
        engine.step()
    long = add(engine, rng, 16 if pace < 1 else 4)
    machine.steps.clear()
    while long.num_waiting > 1:
        engine.step()
    taken = [tokens for _, tokens, _ in machine.steps if tokens]
    assert taken[1:] == [1] * len(taken[1:]), "all but the first piece, whose cost nobody knew"
    assert len(machine.steps) <= 10 * sum(taken) / max(LEAST_EARNED, 1 / pace - 1)


def test_a_short_prompt_overtakes_a_long_one_beside_replies(tiny: Model) -> None:
    """Half of the time that prompts get is its own, and the long prompt goes on meanwhile."""
    rng = random.Random(5)
    engine, machine = paced(tiny, 0.010, 0.004)
    add(engine, rng, 5, max_tokens=900)
    long = add(engine, rng, 300)
    for _ in range(50):
        engine.step()
    machine.steps.clear()
    short, before = add(engine, rng, 40), long.num_computed
    while short.num_waiting > 1:
        engine.step()
    assert len(machine.steps) < 3 * 40 * 0.004 / (0.010 * (1 / 0.7 - 1)), "it had half of the time, or nearly"
    assert long.num_computed - before > 20


def test_a_prompt_that_comes_into_a_quiet_time_does_not_wait(tiny: Model) -> None:
    rng = random.Random(6)
    engine, machine = paced(tiny, 0.010, 0.001)
    add(engine, rng, 5, max_tokens=900)
    for _ in range(30):
        engine.step()
    for _ in range(2):
        machine.steps.clear()
        short = add(engine, rng, 12)
        while short.num_waiting > 1:
            engine.step()
        assert len(machine.steps) <= 2
        for _ in range(10):
            engine.step()


def test_of_many_prompts_the_first_and_the_shortest_get_on(tiny: Model) -> None:
    """A long prompt and then short ones: each step gives tokens to the first, and the short ones are through long before it."""
    rng = random.Random(2)
    engine, _ = paced(tiny, 0.001, 0.001, step_tokens=16, pace=0)
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


@dataclass
class Truth:
    """What the steps of a simulated machine take, in seconds, with noise and, now and then, a step of twenty times as long."""

    decode_s: float = 0.014
    token_s: float = 0.0015
    key_s: float = 0.0
    piece_s: float = 0.0
    noise: float = 0.0
    outliers: float = 0.0

    def seconds(self, tokens: int, keys: int, rng: random.Random) -> float:
        exact = self.decode_s + (self.piece_s + tokens * (self.token_s + self.key_s * keys) if tokens else 0)
        return exact * rng.uniform(1 - self.noise, 1 + self.noise) * (20 if rng.random() < self.outliers else 1)


def simulate(truth: Truth, share: float, length: int) -> tuple[list[float], list[int]]:
    """A prompt beside 8 sequences that decode: what the steps truly took, outliers left out, and how many tokens they had."""
    rng, pace = random.Random(0), Pace(share)
    usual = Truth(**{**vars(truth), "outliers": 0.0})
    for _ in range(30):
        pace.saw(0, 0, truth.seconds(0, 0, rng))
    seconds, tokens, done = [], [], 0
    while done < length:
        count = min(length - done, pace.tokens(pace.spare_s((length - done) * pace.token_s(done)), done, rows=8))
        pace.saw(count, count * done, truth.seconds(count, done, rng))
        seconds.append(usual.seconds(count, done, rng))
        tokens.append(count)
        done += count
    return seconds, tokens


@pytest.mark.parametrize(
    "truth",
    [
        Truth(),
        Truth(noise=0.3),
        Truth(noise=0.3, outliers=0.01),
        Truth(key_s=0.0015 / 4096),  # at the end a token takes nine times as long as at the start
        Truth(key_s=0.0015 / 4096, noise=0.2),
        Truth(piece_s=0.005, noise=0.3),
        Truth(token_s=1e-5, piece_s=0.003),
    ],
    ids=str,
)
@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
def test_pace_and_gaps_hold_whatever_prompts_cost(truth: Truth, share: float) -> None:
    seconds, _ = simulate(truth, share, 30_000)
    unavoidable = (SAVED * (LONGEST - 1) + LONGEST) * truth.decode_s
    promised = truth.decode_s / share * len(seconds)
    assert sum(seconds) < promised * (1.02 if truth.noise else 1) + unavoidable
    assert sum(seconds) > promised * 0.9 - unavoidable, "prompts get what is theirs"
    assert max(seconds) <= 5 * statistics.median(seconds)


@pytest.mark.parametrize("times", [1, 4])
def test_what_comes_with_every_piece_is_shared_out_over_many_tokens(times: int) -> None:
    """As on a GPU, where a step with a prompt is not replayed: it takes twice or five times as long, with one token or 500."""
    _, tokens = simulate(Truth(decode_s=0.002, token_s=4e-6, piece_s=0.002 * times), 0.7, 30_000)
    assert max(tokens) > 120 * times


def test_a_small_share_allows_longer_steps_but_not_all_of_them() -> None:
    seconds, tokens = simulate(Truth(), 0.1, 20_000)
    assert 0.1 < 0.014 / statistics.mean(seconds) < 0.15
    assert sum(count == 0 for count in tokens) >= len(tokens) // ALONE, "some only decode, which tells how long that takes"


def test_the_fit_follows_what_decoding_takes() -> None:
    """Eight times as many sequences: decoding takes three times as long, and prompts get three times as much."""
    rng, pace = random.Random(4), Pace(0.7)
    pace.saw(0, 0, 30.0)  # the first step compiles something
    for decode_s in (0.01, 0.03, 0.01):
        for step in range(150):
            count = pace.tokens(pace.spare_s(10.0), 0, rows=8)
            pace.saw(count, 0, (decode_s + 0.0005 * count) * rng.uniform(0.9, 1.1))
            if step >= 100 and count:
                assert 0.25 < count * 0.0005 / ((LONGEST - 1) * decode_s) < 1.5
        assert abs(pace.decode_s / decode_s - 1) < 0.1


def test_a_pace_that_cannot_be_is_refused() -> None:
    for pace in (-0.1, 1.1):
        with pytest.raises(UsageError, match="pace"):
            EngineConfig(pace=pace)
