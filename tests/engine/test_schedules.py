"""Random schedules: whatever runs beside it, every reply is the one that it would be alone, and all pages come home.

The native kernels give a token's logits the same bits in any company, so there drawn tokens are compared too, from an engine that has
nothing else to do. In plain torch the last place of a logit differs, and draws from a model as undecided as the tiny one now and then with
it (once in 25,000 tokens, where top_p ranks two equal logits); there it is the packed forward's greedy replies.

Some sequences are in the background, and of some prompts it is not a reply that is wanted but the mean of their states.

HERD_SCHEDULES says how many are tried: HERD_SCHEDULES=5000 make test ARGS=tests/engine/test_schedules.py
"""

import os
import random
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from herd.chat import Done, Format, Sampling
from herd.engine.engine import Engine
from herd.engine.local import Model
from herd.engine.mean import Mean
from herd.engine.sequence import Sequence
from herd.ops.native import kernels
from herd.text.images import Tiles
from herd.text.prompt import Prompt
from herd.text.tokenizer import byte_tokenizer
from tests.engine.made import GREEDY, blocks_model, image_prompt, is_clean, make_engine, plain_prompt, random_prompt, shrink
from tests.engine.test_whole import SMALL

from .greedy import greedy_reply, packed_mean
from .test_lookup import Oracle

CONTEXT, CHUNK = 112, 16
SEEDS = range(int(os.environ.get("HERD_SCHEDULES", "50")))
LENGTHS = [1, 3, 15, 16, 17, 31, 33, 50, 64]


@pytest.fixture(scope="module")
def native() -> Model:
    """As much of a model as an engine is made of."""
    if kernels() is None:
        pytest.skip("the native kernels are not built here")
    return cast(Model, SimpleNamespace(llama4=blocks_model(SMALL), tokenizer=byte_tokenizer(), tiling=None))


def prompt_like(model: Model, rng: random.Random, before: list[Prompt]) -> Prompt:
    """A new prompt, or one that begins as another did, as far as its images or all of it; at times with another picture in its place."""
    if not before or rng.random() < 0.4:
        return image_prompt(model, rng) if model.tiling and rng.random() < 0.25 else random_prompt(rng, rng.choice(LENGTHS))
    old = rng.choice(before)
    if old.images and rng.random() < 0.3:
        (tiles,) = old.images
        return replace(old, images=(Tiles(tiles.rows, tiles.cols, 255 - tiles.pixels),))
    kept = len(old.tokens) if old.images else rng.randint(1, len(old.tokens))
    tokens = [*old.tokens[:kept], *random_prompt(rng, rng.choice([0, 1, 5, 16, 20])).tokens][: CONTEXT - 25]
    return replace(plain_prompt(tokens), images=old.images)


def alone(model: Model, prompt: Prompt, sampling: Sampling) -> list[int]:
    """The packed forward's greedy reply; in native code, that of an engine which has nothing else to do and neither keeps nor guesses."""
    if model.tiling:
        return greedy_reply(model, prompt, sampling.max_tokens or 0)
    engine = make_engine(model, prefix_cache=False, draft_tokens=0)
    engine.scheduler.add(engine.sequence(prompt, sampling, lambda event: None))
    events = []
    while not engine.scheduler.is_idle:
        events += [event for _, event in engine.step()]
    assert isinstance(events[-1], Done)
    return list(events[-1].tokens)


def mean_alone(model: Model, prompt: Prompt) -> torch.Tensor:
    """The same for the mean of a prompt's states."""
    if model.tiling:
        return packed_mean(model, prompt)
    engine, mean = make_engine(model), Mean()
    engine.scheduler.add(engine.sequence(prompt, GREEDY, lambda event: None, mean=mean))
    while not engine.scheduler.is_idle:
        engine.step()
    return torch.tensor(mean.embedding.vector)


def starved_engine(model: Model, rng: random.Random) -> Engine:
    """Random sizes, and pages for little more than the longest sequence."""
    page_tokens = rng.choice([1, 2, 4, 4, 8, 16])
    max_sequences = rng.randint(1, 5)
    engine = make_engine(
        model,
        page_tokens=page_tokens,
        context_tokens=CONTEXT,
        max_sequences=max_sequences,
        step_tokens=rng.randint(max_sequences, 80),
        pace=rng.choice([0, 0.5, 0.9, 1]),
        draft_tokens=rng.choice([0, 1, 8, 8]),
        prefix_cache=rng.random() < 0.9,
    )
    full, local = CONTEXT // page_tokens, CHUNK // page_tokens
    shrink(engine, full=rng.randint(full, 2 * full), local=rng.randint(local, 3 * local))
    return engine


def check_tables(engine: Engine) -> None:
    """Every page is held by just those whose tables have it, and no page that is still written by two."""
    pages = engine.pages
    for pool, tables in (
        (pages.full, [s.full_table for s in engine.scheduler.running]),
        (pages.local, [s.local_table for s in engine.scheduler.running]),
    ):
        held = [page for table in tables for page in table]
        assert all(pool.holders[page] == held.count(page) for page in range(len(pool.holders)))
        assert not set(held) & {*pool.free, *pool.kept}
        assert len(set(held)) + pool.room == pool.num_pages
    for sequence in engine.scheduler.running:
        assert all(pages.full.holders[page] == 1 for page in sequence.full_table[sequence.num_computed // pages.page_tokens :])


def check_order(engine: Engine) -> None:
    """Whoever is in the background stands behind all others."""
    for line in (engine.scheduler.running, engine.scheduler.waiting):
        assert [s.background for s in line] == sorted(s.background for s in line)


@pytest.mark.parametrize("seed", SEEDS)
def test_greedy_replies_are_the_packed_forwards(tiny: Model, seed: int) -> None:
    run(tiny, random.Random(seed), [GREEDY], atol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_drawn_replies_are_those_of_an_engine_with_nothing_else_to_do(native: Model, seed: int) -> None:
    run(
        native,
        random.Random(seed),
        [
            GREEDY,
            Sampling(temperature=1.0, top_p=0.9, seed=seed, max_tokens=24),
            Sampling(temperature=0.2, seed=1),
            Sampling(temperature=1.0, seed=seed, frequency_penalty=1.0, repetition_penalty=1.1, logit_bias={101: 4.0}, logprobs=1),
            Sampling(temperature=1.5, top_p=1.0, seed=seed, format=Format(kind="json_object")),
            Sampling(temperature=1.0, seed=seed, presence_penalty=0.5, format=Format(kind="regex", value="(abcab){1,9}|[0-9]*")),
        ],
    )


def run(model: Model, rng: random.Random, samplings: list[Sampling], atol: float = 0.0) -> None:
    """Arrivals in front and in the background, prefixes that are shared, images, guesses, means, aborts, starvation of both kinds of
    pages; at the end nothing is held."""
    engine = starved_engine(model, rng)
    prompts: list[Prompt] = []
    for _ in range(rng.randint(1, 8)):
        prompts.append(prompt_like(model, rng, prompts))
    coming = list(prompts)
    want: dict[Sequence, list[int]] = {}
    found: dict[Sequence, list[int]] = {}
    aborted: set[Sequence] = set()
    means: dict[Sequence, torch.Tensor] = {}
    for _ in range(3000):
        if coming and rng.random() < 0.3:
            prompt = coming.pop(rng.randrange(len(coming)))
            sampling = replace(rng.choice(samplings), max_tokens=rng.randint(1, 24))
            salt, background = rng.choice([b"", b"", b"", b"x"]), rng.random() < 0.4
            mean = Mean() if rng.random() < 0.2 else None
            sequence = engine.sequence(prompt, sampling, lambda event: None, salt=salt, background=background, mean=mean)
            want[sequence] = alone(model, prompt, sampling) if mean is None else []
            if mean is not None:
                means[sequence] = mean_alone(model, prompt)
            elif engine.config.draft_tokens and rng.random() < 0.7:
                sequence.lookup = Oracle(sequence.num_prompt, tuple(want[sequence]), rng)
            engine.scheduler.add(sequence)
        if want and rng.random() < 0.02:
            victim = rng.choice(list(want))
            engine.scheduler.remove(victim)
            aborted.add(victim)
        if engine.scheduler.is_idle:
            if not coming:
                break
            continue
        for sequence, event in engine.step():
            if isinstance(event, Done):
                found[sequence] = list(event.tokens)
        check_tables(engine)
        check_order(engine)
    assert engine.scheduler.is_idle and not coming
    assert is_clean(engine)
    for sequence, reply in want.items():
        if sequence not in aborted:
            assert found[sequence] == reply
            if sequence.mean is not None:
                torch.testing.assert_close(torch.tensor(sequence.mean.embedding.vector), means[sequence], atol=atol, rtol=0)
