"""Sequences in the background: after all others in everything, and yet they end. Whole schedules with them are in test_schedules.py."""

import random
from typing import Any

from herd.chat import Sampling
from herd.engine.engine import Engine
from herd.engine.local import Model
from herd.engine.pace import LONGEST, SAVED
from herd.engine.scheduler import Plan
from herd.engine.sequence import Sequence
from tests.engine.made import is_clean, make_engine, random_prompt, shrink

from .test_pace import Machine, paced


def add(engine: Engine, rng: random.Random, length: int, *, background: bool, max_tokens: int = 8) -> Sequence:
    sampling = Sampling(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    sequence = engine.sequence(random_prompt(rng, length), sampling, lambda event: None, background=background)
    engine.scheduler.add(sequence)
    return sequence


def finish(engine: Engine) -> None:
    while not engine.scheduler.is_idle:
        engine.step()
    assert is_clean(engine)


def test_one_who_waits_takes_a_place_from_the_background(tiny: Model) -> None:
    engine, rng = make_engine(tiny, max_sequences=2), random.Random(0)
    behind = [add(engine, rng, 5, background=True) for _ in range(3)]
    engine.step()
    assert engine.scheduler.running == behind[:2]
    front = [add(engine, rng, 5, background=False) for _ in range(2)]
    assert list(engine.scheduler.waiting) == [*front, behind[2]]
    engine.step()
    assert engine.scheduler.running == front and list(engine.scheduler.waiting) == behind
    finish(engine)
    assert all(sequence.finish == "length" for sequence in (*front, *behind))


def test_a_prompt_that_somebody_waits_for_has_its_steps_alone(tiny: Model) -> None:
    engine, rng = make_engine(tiny, step_tokens=16), random.Random(1)
    behind = [add(engine, rng, 9, background=True, max_tokens=50) for _ in range(3)]
    for _ in range(6):
        engine.step()
    front = add(engine, rng, 30, background=False)
    while front.num_waiting > 1:
        plan = engine.scheduler.next()
        assert {piece.sequence for piece in plan.pieces} == {front}
        for piece in plan.pieces:  # as if computed
            engine.scheduler.pages.computed(front, min(piece.stop, front.num_prompt - 1))
    assert all(sequence in engine.scheduler.running for sequence in behind)


def test_the_background_gives_its_pages_up_first(tiny: Model) -> None:
    """Also where it arrived first."""
    engine, rng = make_engine(tiny, prefix_cache=False, draft_tokens=0), random.Random(2)
    shrink(engine, full=14, local=1000)  # 56 tokens
    behind = add(engine, rng, 5, background=True, max_tokens=30)
    engine.step()
    front = [add(engine, rng, 5, background=False, max_tokens=20) for _ in range(2)]
    preempted: list[Sequence] = []
    send_back = engine.scheduler._send_back
    engine.scheduler._send_back = lambda: preempted.append(send_back()) or preempted[-1]  # type: ignore[method-assign, func-returns-value]
    finish(engine)
    assert set(preempted) == {behind} and behind.finish == front[0].finish == "length"


class Rows(Machine):
    """A step takes `decode_s`, and `token_s` for each row of the background or of a prompt beside what decodes."""

    def see(self, plan: Plan) -> None:
        front = [piece for piece in plan.pieces if not piece.sequence.background]
        rows = sum(piece.stop - piece.start for piece in plan.pieces if piece.sequence.background or not piece.is_decoding)
        self.steps.append((bool(front), rows, self.decode_s + self.token_s * rows))


def rows_engine(tiny: Model, **choices: Any) -> tuple[Engine, Rows]:
    engine, machine = paced(tiny, 0.010, 0.00125, **choices)
    rows = Rows(machine.runner, 0.010, 0.00125)
    engine.runner = rows  # type: ignore[assignment]
    engine.watch.clock = lambda: rows.now
    return engine, rows


def test_a_reply_keeps_its_share_beside_the_background(tiny: Model) -> None:
    """And the background, replies and prompts, has what is left, whole steps as soon as it is alone."""
    engine, machine = rows_engine(tiny, pace=0.7)
    rng = random.Random(3)
    front = add(engine, rng, 5, background=False, max_tokens=400)
    for _ in range(20):
        engine.step()
    behind = [add(engine, rng, rng.choice([5, 60]), background=True, max_tokens=30) for _ in range(8)]
    machine.steps.clear()
    while front in engine.scheduler.running:
        engine.step()
    assert sum(s for *_, s in machine.steps) <= (len(machine.steps) / 0.7 + SAVED * (LONGEST - 1)) * 0.010
    assert max(s for *_, s in machine.steps) <= (1 + (LONGEST - 1) * 4 / 3) * 0.010
    done = [sequence for sequence in behind if sequence.finish]
    assert done and sum(rows for _, rows, _ in machine.steps) > 0.25 * len(machine.steps)
    machine.steps.clear()
    finish(engine)
    assert all(sequence.finish for sequence in behind)
    assert len(machine.steps) <= 35


def test_without_a_pace_the_background_decodes_beside_others(tiny: Model) -> None:
    engine, rng = make_engine(tiny, pace=0, draft_tokens=0), random.Random(4)
    front = add(engine, rng, 5, background=False, max_tokens=30)
    behind = add(engine, rng, 5, background=True, max_tokens=20)
    for _ in range(25):
        engine.step()
    assert not front.finish and behind.finish == "length"
