"""What an engine tells of itself."""

from dataclasses import asdict
from itertools import count

import pytest

from herd.chat import Sampling
from herd.engine.config import EngineConfig
from herd.engine.engine import Engine
from herd.engine.local import Model

from .test_engine import make_engine, plain_prompt, shrink


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
