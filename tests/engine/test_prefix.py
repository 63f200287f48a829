"""Pages that are taken over: the rule against one that is plain to see, keys, and engines that share, keep and lose what they computed."""

import random
from dataclasses import replace

import numpy as np
import pytest

from herd.chat import Done, Sampling
from herd.engine.engine import Engine
from herd.engine.local import Model
from herd.engine.pages import PagePool
from herd.engine.prefix import Chain, Placed, resume
from herd.engine.sequence import Sequence
from herd.model.init import init_weights
from herd.model.llama4 import build
from herd.model.presets import TINY
from herd.text.images import Tiles
from herd.text.prompt import Prompt
from tests.engine.made import GREEDY, image_prompt, is_clean, make_engine, plain_prompt, random_prompt, start

from .greedy import greedy_reply

CHUNK, PAGE = 16, 4


def plain_rule(full: set[int] | None, local: set[int] | None, limit: int, chunk_pages: int | None) -> int:
    """Every n tried, the largest first: all global pages before it, and all local ones from the start of its chunk."""
    for n in range(limit, 0, -1):
        begin = n // chunk_pages * chunk_pages if chunk_pages else 0
        if (full is None or full >= set(range(n))) and (local is None or local >= set(range(begin, n))):
            return n
    return 0


@pytest.mark.parametrize("kinds", ["both", "full", "local"])
@pytest.mark.parametrize("chunk_pages", [1, 2, 4, None])
def test_the_rule_is_the_plain_one(kinds: str, chunk_pages: int | None) -> None:
    rng = random.Random(0)
    for _ in range(2000):
        limit = rng.randint(0, 14)
        share = rng.random()
        full, local = ({page for page in range(14) if rng.random() < share or rng.random() < share} for _ in range(2))
        has_full, has_local = full if kinds != "local" else None, local if kinds != "full" else None
        names = [{b"%d" % page for page in pages} if pages is not None else None for pages in (has_full, has_local)]
        found = resume(lambda page: b"%d" % page, range(limit), *names, chunk_pages)
        assert found == plain_rule(has_full, has_local, limit, chunk_pages)


def chain(tokens: list[int], salt: bytes = b"", images: tuple[Placed, ...] = ()) -> list[bytes]:
    made = Chain(page_tokens=PAGE, salt=salt, images=images)
    return [made.key(tokens, page) for page in range(len(tokens) // PAGE)]


def test_a_key_names_all_that_comes_before_it() -> None:
    tokens = list(range(16))
    keys = chain(tokens)
    assert len(set(keys)) == 4 and chain(tokens[:8]) == keys[:2]
    assert chain([99, *tokens[1:]])[3] != keys[3], "another first token changes every key"
    assert chain([*tokens[:15], 99])[:3] == keys[:3]
    assert not set(chain(tokens, salt=b"a")) & set(keys)
    pixels = np.zeros((1, 8, 8, 3), np.uint8)
    black, white = (chain(tokens, images=(Placed(5, 9, Tiles(1, 1, p)),)) for p in (pixels, pixels + 255))
    assert black[0] == white[0] == keys[0]
    assert all(a != b for a, b in zip(black[1:], white[1:], strict=True))


def test_pages_are_lost_from_the_ends_of_chains_and_the_oldest_first() -> None:
    pool = PagePool(6)
    first, second = pool.take(3), pool.take(3)
    for name, pages in ((b"a", first), (b"b", second)):
        for i, page in enumerate(pages):
            pool.register(page, name + b"%d" % i)
    pool.register(first[0], b"other")
    assert b"other" not in pool, "what a page holds does not change"
    pool.give_back(first)
    pool.give_back(second)
    assert pool.room == 6 and pool.take(1) == [2] and b"a2" not in pool and b"a1" in pool
    assert pool.share([b"a0"]) == [0] and pool.room == 4
    assert pool.take(4) == [1, 5, 4, 3] and pool.num_evicted == 5


def ask(engine: Engine, prompt: Prompt, sampling: Sampling = GREEDY, salt: bytes = b"") -> Done:
    sequence = engine.sequence(prompt, sampling, lambda event: None, salt)
    engine.scheduler.add(sequence)
    events = []
    while not engine.scheduler.is_idle:
        events += [event for _, event in engine.step()]
    assert isinstance(events[-1], Done)
    return events[-1]


def test_a_conversation_goes_on_where_it_was(tiny: Model) -> None:
    """Prompt, reply, and the next question: what is computed is the rest of the last page and the question."""
    engine = make_engine(tiny)
    prompt = random_prompt(random.Random(1), 42)
    sampling = Sampling(temperature=0, max_tokens=20, ignore_eos=True)
    first = ask(engine, prompt, sampling)
    assert first.usage.cached_tokens == 0
    again = ask(engine, prompt, sampling)
    assert again.tokens == first.tokens and again.usage.cached_tokens == 40, "a page is left to compute, for the last token is in it"
    longer = plain_prompt([*prompt.tokens, *first.tokens, 1, 2, 3])
    reply = ask(engine, longer)
    assert reply.usage.cached_tokens == 60 and list(reply.tokens) == greedy_reply(tiny, longer, 24)
    assert ask(engine, plain_prompt(prompt.tokens[:40])).usage.cached_tokens == 36, "one token must be computed for its logits"
    assert ask(engine, longer, salt=b"another tenant").usage.cached_tokens == 0
    assert is_clean(engine)
    assert ask(make_engine(tiny, prefix_cache=False), longer).usage.cached_tokens == 0


def test_within_a_chunk_its_local_pages_are_needed_and_at_a_border_none(tiny: Model) -> None:
    """Global pages of 44 tokens, local ones lost: the next prompt goes on at 32, where a chunk of 16 begins."""
    engine = make_engine(tiny)
    prompt = random_prompt(random.Random(2), 45)
    ask(engine, prompt)
    local = engine.pages.local
    lost = local.take(local.num_pages)
    local.give_back(lost)
    assert not local.kept
    reply = ask(engine, prompt)
    assert reply.usage.cached_tokens == 32
    assert list(reply.tokens) == greedy_reply(tiny, prompt, 24)
    full = engine.pages.full
    lost = full.take(full.num_pages)
    full.give_back(lost)
    assert ask(engine, prompt).usage.cached_tokens == 0, "local pages alone do not help where there are global layers"


def test_pages_that_still_get_written_are_not_shared(tiny: Model) -> None:
    """Twelve of the same prompt and of its beginnings at once: pages with a holder more are full and computed."""
    engine = make_engine(tiny, step_tokens=24)
    prompt = random_prompt(random.Random(3), 50)
    prompts = [plain_prompt(prompt.tokens[:length]) for length in (50, 50, 49, 37, 33, 32, 31, 17, 50, 20, 10, 50)]
    sequences = [engine.sequence(p, GREEDY, lambda event: None) for p in prompts]
    done: dict[Sequence, Done] = {}
    for sequence in sequences:
        engine.scheduler.add(sequence)
    while not engine.scheduler.is_idle:
        done |= {s: event for s, event in engine.step() if isinstance(event, Done)}
        for sequence in engine.scheduler.running:
            begun = sequence.full_table[sequence.num_computed // PAGE :]
            assert all(engine.pages.full.holders[page] == 1 for page in begun)
    assert is_clean(engine)
    for sequence in sequences:
        assert list(done[sequence].tokens) == greedy_reply(tiny, sequence.prompt, 24)
    assert done[sequences[1]].usage.cached_tokens > 0, "they ran at the same time and shared"


def test_images_are_told_apart_and_encoded_only_where_they_are_computed(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(tiny)
    prompt = image_prompt(tiny, random.Random(5))
    (tiles,) = prompt.images
    other = replace(prompt, images=(Tiles(tiles.rows, tiles.cols, 255 - tiles.pixels),))
    first = ask(engine, prompt)
    changed = ask(engine, other)
    assert changed.usage.cached_tokens == 8, "the text before the picture"
    assert list(changed.tokens) == greedy_reply(tiny, other, 24)
    monkeypatch.setattr(engine.runner.model, "see", None)  # calling it fails
    again = ask(engine, prompt)
    assert again.tokens == first.tokens and again.usage.cached_tokens == (len(prompt.tokens) - 1) // PAGE * PAGE


@pytest.mark.parametrize("chunk_tokens", [CHUNK, None])
def test_a_model_of_local_layers_only(chunk_tokens: int | None) -> None:
    """The chunk it is in, or without chunks everything, is what it needs; what lies in chunks before has no way to the last token."""
    config = replace(TINY, vision=None, num_experts=0, global_step=None, temperature_tuning=False, chunk_tokens=chunk_tokens)
    model = init_weights(build(config, device="cpu"), 0, std=0.15)
    prompt = [random.Random(7).randrange(256) for _ in range(46)]
    engine, sequences = start(model, [prompt, prompt, [1, *prompt[1:]]], max_tokens=6, max_sequences=1)
    done = []
    for sequence in sequences:
        engine.scheduler.add(sequence)
        while not engine.scheduler.is_idle:
            done += [event for _, event in engine.step() if isinstance(event, Done)]
    assert done[0].tokens == done[1].tokens
    assert [event.usage.cached_tokens for event in done] == ([32, 44, 32] if chunk_tokens else [0, 44, 0])
    cold, (alone,) = start(model, [prompt], max_tokens=6, prefix_cache=False)
    cold.scheduler.add(alone)
    while not cold.scheduler.is_idle:
        cold.step()
    assert tuple(alone.tokens[46:]) == done[0].tokens
    assert is_clean(engine)


def test_who_gave_way_goes_on_where_he_was(tiny: Model) -> None:
    """Two sequences that do not fit together: the second gives way, and finds what nobody needed meanwhile."""
    engine = make_engine(tiny, context_tokens=160)
    engine.pages.full.free = type(engine.pages.full.free)(range(40))
    engine.pages.full.num_pages = 40
    sampling = Sampling(temperature=0, max_tokens=60, ignore_eos=True)
    rng = random.Random(9)
    sequences = [engine.sequence(random_prompt(rng, 40), sampling, lambda event: None) for _ in range(2)]
    for sequence in sequences:
        engine.scheduler.add(sequence)
    gave_way = 0
    while not engine.scheduler.is_idle:
        engine.step()
        gave_way += sequences[1].num_computed < sequences[1].num_reached
    assert gave_way and engine.scheduler.tally.hit_tokens > 0
    assert all(s.num_cached == 0 for s in sequences), "what a sequence computed itself is not told as saved"
    for sequence in sequences:
        want = [*sequence.prompt.tokens]
        assert sequence.tokens[:40] == want and len(sequence.tokens) == 100
    alone = ask(make_engine(tiny), sequences[1].prompt, sampling)
    assert list(alone.tokens) == sequences[1].tokens[40:]
    assert is_clean(engine)
