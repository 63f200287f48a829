"""What an engine tells of itself."""

import json
import random
from collections import Counter
from dataclasses import asdict
from itertools import count

import pytest

from herd.chat import Done, Sampling
from herd.engine.config import EngineConfig
from herd.engine.engine import Engine
from herd.engine.local import Model
from herd.errors import HerdError
from tests.engine.made import make_engine, plain_prompt, shrink


def test_pages_add_up_at_every_step(tiny: Model) -> None:
    engine = make_engine(tiny, max_sequences=2, context_tokens=80)
    shrink(engine, full=24, local=6)
    sampling = Sampling(temperature=0, max_tokens=30, ignore_eos=True)
    for length in (30, 41, 30):
        engine.scheduler.add(engine.sequence(plain_prompt(list(range(length))), sampling, lambda event: None))
    assert engine.stats().num_waiting == 3 and engine.stats().num_steps == 0
    steps = 0
    while not engine.scheduler.is_idle:
        engine.step()
        steps += 1
        stats = engine.stats()
        for pages, total in ((stats.full_pages, 24), (stats.local_pages, 6)):
            assert pages.used + pages.cached + pages.free == total
    assert (stats.num_waiting, stats.num_running, stats.num_steps) == (0, 0, steps)
    assert (stats.full_pages.used, stats.local_pages.used) == (0, 0) and stats.full_pages.cached
    assert stats.hit_tokens >= 28 and stats.local_pages.evicted
    assert 0 <= stats.accepted_tokens <= stats.drafted_tokens
    assert asdict(stats)["full_pages"]["free"] == stats.full_pages.free


def test_seconds_are_those_of_the_clock(tiny: Model) -> None:
    """Six looks at the clock in a step, one tick each: five parts of one tick."""
    ticks = count()
    engine = Engine(tiny.llama4, tiny.tokenizer, EngineConfig(kv_gib=0.01), clock=lambda: float(next(ticks)))
    engine.scheduler.add(engine.sequence(plain_prompt([1, 2, 3]), Sampling(max_tokens=4, ignore_eos=True), lambda event: None))
    while not engine.scheduler.is_idle:
        engine.step()
    stats = engine.stats()
    assert stats.seconds == pytest.approx(dict.fromkeys(("plan", "see", "run", "sample", "accept"), float(stats.num_steps)))


def test_totals_are_those_of_the_events(tiny: Model) -> None:
    """Starved of pages, some taken away, some failing: every sequence is counted once, and tokens are those that readers were told of."""
    rng = random.Random(3)
    engine = make_engine(tiny, max_sequences=4, context_tokens=96, step_tokens=24, draft_tokens=4, pace=0)
    shrink(engine, full=30, local=9)
    planned, plans = 0, engine.scheduler.next

    def next_plan() -> object:
        nonlocal planned
        plan = plans()
        planned += sum(len(piece.tokens) for piece in plan.pieces)
        return plan

    engine.scheduler.next = next_plan  # type: ignore[method-assign,assignment]
    sequences = []
    for i in range(14):
        sampling = Sampling(temperature=0, max_tokens=rng.randint(2, 30), ignore_eos=i % 2 == 0)
        sequences.append(engine.sequence(plain_prompt([rng.randrange(3) for _ in range(rng.randint(5, 60))]), sampling, lambda event: None))
        engine.scheduler.add(sequences[-1])
    broken, aborted = sequences[5], (sequences[9], sequences[2])

    def fail(logits: object, drafts: object) -> list[int]:
        raise HerdError("no number")

    broken.sampler.draw = fail  # type: ignore[method-assign]
    reasons: Counter[str] = Counter(stop=0, length=0)
    failed, prompts, generated = 0, 0, 0
    while not engine.scheduler.is_idle:
        for _, event in engine.step():
            failed += isinstance(event, HerdError)
            if isinstance(event, Done):
                reasons[event.reason] += 1
                prompts += event.usage.prompt_tokens
                generated += event.usage.completion_tokens
        for sequence in aborted:
            if sequence in engine.scheduler.running and len(sequence.tokens) > sequence.num_prompt:
                prompts += sequence.num_prompt
                generated += len(sequence.tokens) - sequence.num_prompt
                engine.scheduler.remove(sequence)
    engine.scheduler.remove(sequences[0])  # it has ended: not counted
    stats = engine.stats()
    assert stats.num_finished == reasons and sum(reasons.values()) == 11
    assert (stats.num_aborted, stats.num_failed, failed) == (2, 1, 1)
    assert (stats.prompt_tokens, stats.generated_tokens) == (prompts, generated)
    assert stats.computed_tokens == planned and stats.num_preempted > 0
    assert stats.num_waiting == stats.num_running == 0
    assert json.loads(json.dumps(asdict(stats)))["num_finished"] == dict(reasons)  # plain data
