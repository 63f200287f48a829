"""The engine against the packed forward, step by step, and what it refuses. Whole schedules are in test_schedules.py."""

import random

import pytest
import torch

from herd.chat import ChatEvent, Done, Progress, Sampling, Text
from herd.engine.engine import Engine
from herd.engine.local import Model
from herd.engine.sequence import Sequence
from herd.errors import ContextError, HerdError, PromptError, UsageError
from herd.text.prompt import Prompt
from tests.engine.made import GREEDY, image_prompt, is_clean, make_engine, plain_prompt, random_prompt

from .greedy import packed_logits


@pytest.mark.parametrize("seed", range(6))
def test_every_step_gives_the_logits_of_the_packed_forward(tiny: Model, seed: int) -> None:
    """Shuffled pages, prefill cut at random points, ragged decode, images: equal to 1e-5, across chunk borders of 16."""
    rng = random.Random(seed)
    engine = make_engine(tiny, max_sequences=3)
    for pool in (engine.pages.full, engine.pages.local):
        pages = list(pool.free)
        rng.shuffle(pages)
        pool.free = type(pool.free)(pages)
    prompts = [random_prompt(rng, rng.randint(1, 90)) for _ in range(3)] + [image_prompt(tiny, rng)]
    sequences = [engine.sequence(p, GREEDY, lambda event: None) for p in prompts]
    for sequence in sequences:
        engine.scheduler.add(sequence)

    seen: list[tuple[Sequence, int, list[int], torch.Tensor]] = []
    runner = engine.runner

    class Spy:
        def see(self, plan):  # type: ignore[no-untyped-def]
            self.plan = plan
            runner.see(plan)

        def __call__(self, inputs):  # type: ignore[no-untyped-def]
            logits = runner(inputs)
            for piece, rows in zip(self.plan.due, logits.split([p.num_rows for p in self.plan.due]), strict=True):
                length = len(piece.sequence.tokens)
                seen.extend((piece.sequence, length, list(piece.drafts)[:i], row.clone()) for i, row in enumerate(rows))
            return logits

    engine.runner = Spy()  # type: ignore[assignment]
    while not engine.scheduler.is_idle:
        object.__setattr__(engine.config, "step_tokens", rng.randint(1, 40))  # a new cut every step
        engine.step()
    assert is_clean(engine)
    assert len(seen) >= 4 * 3
    for sequence, prompt in zip(sequences, prompts, strict=True):
        features = None
        if prompt.images:
            features = torch.cat([tiny.llama4.see(torch.from_numpy(tiles.pixels)) for tiles in prompt.images])
        whole = packed_logits(tiny.llama4, sequence.tokens, features)
        for _, length, drafts, row in (x for x in seen if x[0] is sequence):
            if sequence.tokens[length : length + len(drafts)] == drafts:
                assert (row - whole[length + len(drafts) - 1]).abs().max() < 1e-5


def collect(engine: Engine, prompt: Prompt, sampling: Sampling) -> list[ChatEvent]:
    sequence = engine.sequence(prompt, sampling, lambda event: None)
    engine.scheduler.add(sequence)
    events = []
    while not engine.scheduler.is_idle:
        events += [event for _, event in engine.step()]
    return events


def test_the_last_event_is_done_and_usage_adds_up(tiny: Model) -> None:
    events = collect(make_engine(tiny), plain_prompt([1, 2, 3]), Sampling(temperature=0, max_tokens=5, ignore_eos=True))
    done = events[-1]
    assert isinstance(done, Done) and all(isinstance(event, Text) for event in events[:-1])
    assert (done.reason, done.usage.prompt_tokens, done.usage.completion_tokens, len(done.tokens)) == ("length", 3, 5, 5)


def test_progress_is_told_of_every_piece_but_the_last(tiny: Model) -> None:
    engine = make_engine(tiny, step_tokens=10, max_sequences=4)
    prompt = random_prompt(random.Random(3), 45)
    for cached in (0, 40):  # the second finds the first's full pages; what is left of them is one piece
        told: list[ChatEvent | HerdError] = []
        engine.scheduler.add(engine.sequence(prompt, GREEDY, told.append, progress=True))
        events = []
        while not engine.scheduler.is_idle:
            events += [event for _, event in engine.step()]
        read = [event.read_tokens for event in events if isinstance(event, Progress)]
        assert all(isinstance(event, Progress) for event in events[: len(read)]), "the reply comes after its prompt"
        assert all((e.prompt_tokens, e.cached_tokens) == (45, cached) for e in events if isinstance(e, Progress))
        assert read == sorted(set(read)) and all(cached < count < 45 for count in read)
        assert len(read) >= 4 if not cached else not read
    assert not any(isinstance(event, Progress) for event in collect(engine, random_prompt(random.Random(4), 45), GREEDY))


def test_a_seeded_reply_does_not_depend_on_its_neighbours(tiny: Model) -> None:
    sampling = Sampling(temperature=1.0, seed=11, max_tokens=20, ignore_eos=True)
    alone = collect(make_engine(tiny), plain_prompt([5, 6, 7]), sampling)[-1]
    engine = make_engine(tiny)
    rng = random.Random(4)
    for _ in range(5):
        engine.scheduler.add(engine.sequence(random_prompt(rng, 30), Sampling(temperature=1.5, max_tokens=30), lambda event: None))
    sequence = engine.sequence(plain_prompt([5, 6, 7]), sampling, lambda event: None)
    engine.scheduler.add(sequence)
    events = []
    while not engine.scheduler.is_idle:
        events += [event for owner, event in engine.step() if owner is sequence]
    assert isinstance(alone, Done) and isinstance(events[-1], Done)
    assert alone.tokens == events[-1].tokens


def test_stop_string_ends_the_reply_before_itself(tiny: Model) -> None:
    free = collect(make_engine(tiny), plain_prompt([9, 8, 7]), Sampling(temperature=0, max_tokens=24, ignore_eos=True))
    text = "".join(event.text for event in free if isinstance(event, Text))
    stop = text[2:4]
    events = collect(make_engine(tiny), plain_prompt([9, 8, 7]), Sampling(temperature=0, max_tokens=24, ignore_eos=True, stop=(stop,)))
    assert "".join(event.text for event in events if isinstance(event, Text)) == text[: text.index(stop)]
    assert isinstance(events[-1], Done) and events[-1].reason == "stop"


def test_local_pages_are_those_of_one_chunk(tiny: Model) -> None:
    """A sequence over five chunks holds pages for at most one chunk of local layers, and for all of it in global ones."""
    engine = make_engine(tiny, step_tokens=16)
    sequence = engine.sequence(random_prompt(random.Random(0), 80), Sampling(max_tokens=2), lambda event: None)
    engine.scheduler.add(sequence)
    while sequence.num_computed < 80:
        engine.step()
        assert len(sequence.local_table) <= 16 // 4
        assert len(sequence.full_table) == -(-sequence.num_computed // 4)


@pytest.mark.parametrize(
    ("prompt", "sampling", "error", "words"),
    [
        (plain_prompt([]), GREEDY, PromptError, "empty"),
        (plain_prompt([0] * 2000), GREEDY, ContextError, "2,000 tokens"),
        (plain_prompt([0] * 1000), Sampling(max_tokens=100), ContextError, "max_tokens is 100"),
        (plain_prompt([999]), GREEDY, PromptError, "999"),
        (plain_prompt([-1]), GREEDY, PromptError, "-1"),
        (plain_prompt([268]), GREEDY, PromptError, "1 patch tokens"),
    ],
)
def test_what_can_never_run_is_refused_at_the_door(
    tiny: Model, prompt: Prompt, sampling: Sampling, error: type[HerdError], words: str
) -> None:
    with pytest.raises(error, match=words):
        make_engine(tiny).sequence(prompt, sampling, lambda event: None)


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"page_tokens": 5}, "does not divide"),
        ({"context_tokens": 1024, "kv_gib": 1e-6}, "GiB"),
        ({"max_sequences": 0}, "max_sequences"),
        ({"step_tokens": 2, "max_sequences": 3}, "step_tokens"),
        ({"kv_gib": 0}, "kv_gib"),
    ],
)
def test_choices_that_cannot_be_are_refused(tiny: Model, choices: dict[str, float], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make_engine(tiny, **choices)
