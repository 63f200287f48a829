"""The thread that owns an engine, step by step: the test lets each step go on."""

import queue
import random
from dataclasses import dataclass, field
from typing import Any

import pytest

from herd.chat import Sampling
from herd.engine.local import Model
from herd.engine.scheduler import Plan
from herd.engine.sequence import Sequence
from herd.engine.thread import EngineThread
from tests.engine.made import is_clean, make_engine, random_prompt

WAIT_S = 10.0


@dataclass
class Gate:
    """Stands before a runner: says what each step is about to compute, and waits until it may."""

    runner: Any
    whole: None = None
    plans: "queue.SimpleQueue[Plan]" = field(default_factory=queue.SimpleQueue)
    passes: "queue.SimpleQueue[None]" = field(default_factory=queue.SimpleQueue)

    def see(self, plan: Plan) -> None:
        self.plans.put(plan)
        self.passes.get(timeout=WAIT_S)
        self.runner.see(plan)

    def __call__(self, inputs: Any) -> Any:
        return self.runner(inputs)


@pytest.mark.parametrize("state", ["reading its prompt", "decoding", "in the queue"])
def test_what_is_cancelled_has_no_pages_when_the_next_step_is_planned(tiny: Model, state: str) -> None:
    engine = make_engine(tiny, max_sequences=2, step_tokens=16, prefix_cache=False)
    gate = Gate(engine.runner)
    engine.runner = gate  # type: ignore[assignment]
    rng = random.Random(0)

    def sequence(length: int) -> Sequence:
        return engine.sequence(random_prompt(rng, length), Sampling(temperature=0, max_tokens=200, ignore_eos=True), lambda event: None)

    one, other = sequence(3), sequence(3)
    cancelled = sequence(200 if state == "reading its prompt" else 4)
    first = [one, other, cancelled] if state == "in the queue" else [one, cancelled]
    thread = EngineThread(engine, "gated")
    for each in first:
        thread.submit(each)
    for _ in range(5):
        gate.plans.get(timeout=WAIT_S)
        gate.passes.put(None)
    gate.plans.get(timeout=WAIT_S)  # a step is under way
    waits = cancelled.num_waiting
    assert {"reading its prompt": waits > 1, "decoding": waits == 1, "in the queue": cancelled in engine.scheduler.waiting}[state]
    thread.cancel(cancelled)
    gate.passes.put(None)
    plan = gate.plans.get(timeout=WAIT_S)
    assert cancelled not in [piece.sequence for piece in plan.pieces]
    assert not cancelled.full_table and not cancelled.local_table
    held = [page for each in first for page in each.full_table]
    assert engine.pages.full.num_pages - engine.pages.full.room == len(held)
    for each in first:
        thread.cancel(each)
    gate.passes.put(None)
    while engine.scheduler.running or engine.scheduler.waiting:
        try:
            gate.plans.get(timeout=0.01)
            gate.passes.put(None)
        except queue.Empty:
            pass
    assert is_clean(engine)
