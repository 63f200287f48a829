"""Guesses: against a plain search, what they learn, and replies that are the same with and without them."""

import random
from collections.abc import Sequence as ListLike
from typing import Any

import pytest
import torch

from herd.chat import Done, Sampling
from herd.engine.engine import Engine
from herd.engine.graphs import Graphs
from herd.engine.local import Model
from herd.engine.lookup import FIRST, LONGEST, Lookup
from herd.engine.payoff import Payoff
from herd.engine.sequence import Sequence
from herd.errors import UsageError
from herd.model.init import init_weights
from herd.model.llama4 import build
from herd.ops.native import kernels
from tests.engine.made import blocks_model, is_clean, make_engine, plain_prompt, start
from tests.engine.test_graphs import SCOUT, traced
from tests.engine.test_whole import FAMILY


def plain_run(tokens: list[int]) -> tuple[int, int]:
    """The position after, and the length of, the longest run (2 to 32 tokens) of last tokens that stands before; 0, 0 for none.

    Among runs of 2 to 4 the longest, and there the last place; what is found is followed backwards.
    """
    for length in (4, 3, 2):
        for place in range(len(tokens) - length - 1, -1, -1):
            if tokens[place : place + length] == tokens[-length:]:
                end = place + length
                while length < min(LONGEST, end) and tokens[end - length - 1] == tokens[-length - 1]:
                    length += 1
                return end, length
    return 0, 0


class Cheap(Payoff):
    """Takes any number of guesses, whatever their chance."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def drafts(self, chance: float, others: int, most: int) -> int:
        return min(self.count, most)


def known(step_s: float, token_s: float) -> Payoff:
    payoff = Payoff()
    payoff.step_s, payoff.token_s = step_s, token_s
    return payoff


def test_guesses_are_the_plain_ones() -> None:
    """Ids of one to four bytes, with bytes that look like others' halves. What is copied may copy itself."""
    rng = random.Random(0)
    for _ in range(300):
        ids = rng.choice([[0, 1], [0, 256, 1], [1, 65536, 257, 65537], [202047, 3, 770], list(range(30))])
        tokens = [rng.choice(ids) for _ in range(rng.randint(1, 12))]
        lookup = Lookup(8)
        for _ in range(20):
            most, count = rng.randint(0, 8), rng.randint(1, 8)
            end, length = plain_run(tokens)
            grown = list(tokens)
            for i in range(min(most, count) if length else 0):
                grown.append(grown[end + i])
            assert lookup.drafts(tokens, most, Cheap(count)) == grown[len(tokens) :]
            tokens += [rng.choice(ids) for _ in range(rng.randint(1, 3))]


def test_chances_are_learned_with_and_without_guesses() -> None:
    """Of a text that repeats itself, a lookup that may not guess learns the same as one that does."""
    part = [random.Random(1).randrange(1000) for _ in range(50)]
    text = part * 4
    asked, unasked = Lookup(1), Lookup(1)
    for end in range(1, len(text)):
        drafts = asked.drafts(text[:end], 1, Cheap(1))
        if drafts:
            asked.learn(1, int(drafts[0] == text[end]))
        assert not unasked.drafts(text[:end], 1, Cheap(0))
    unasked.drafts(text, 1, Cheap(0))
    for kind in range(5):
        assert asked.chance(kind) == unasked.chance(kind) > FIRST[kind]
    assert asked.num_accepted == asked.num_drafted > 100 and unasked.num_drafted == 0


def test_where_guesses_are_wrong_they_end() -> None:
    """After two tokens that stood together before comes each time another: a few are tried, and then none."""
    lookup, payoff, tokens = Lookup(8), known(20e-3, 1e-3), [1, 2]
    drafted = []
    for i in range(60):
        tokens += [100 + i, 1, 2]
        drafts = lookup.drafts(tokens, 8, payoff)
        lookup.learn(len(drafts), 0)
        drafted.append(len(drafts))
    assert 0 < sum(drafted) < 10 and not any(drafted[-40:])
    assert not Lookup(0).drafts([1] * 20, 8, payoff)


def replies(engine: Engine, sequences: list[Sequence]) -> list[tuple[int, ...]]:
    found: dict[Sequence, tuple[int, ...]] = {}
    for sequence in sequences:
        engine.scheduler.add(sequence)
    while not engine.scheduler.is_idle:
        found |= {s: event.tokens for s, event in engine.step() if isinstance(event, Done)}
    assert is_clean(engine)
    return [found[sequence] for sequence in sequences]


class Oracle(Lookup):
    """Knows the reply, and lies at times: what a random model says seldom repeats itself, and this is right and wrong often."""

    def __init__(self, num_prompt: int, reply: tuple[int, ...], rng: random.Random) -> None:
        super().__init__(8)
        self.num_prompt, self.reply, self.rng = num_prompt, reply, rng

    def drafts(self, tokens: ListLike[int], most: int, payoff: Payoff, others: int = 0) -> list[int]:
        done = len(tokens) - self.num_prompt
        found = list(self.reply[done : done + min(max(most, 0), self.rng.randint(0, self.most))])
        if found and self.rng.random() < 0.6:
            found[self.rng.randrange(len(found))] = self.rng.randrange(256)
        return found


def with_oracles(sequences: list[Sequence], known: list[tuple[int, ...]], rng: random.Random) -> list[Sequence]:
    for sequence, reply in zip(sequences, known, strict=True):
        sequence.lookup = Oracle(sequence.num_prompt, reply, rng)
    return sequences


def looping_prompts(rng: random.Random) -> list[list[int]]:
    """Prompts of which much comes again, so that there is something to guess."""
    found = []
    for _ in range(6):
        part = [rng.randrange(256) for _ in range(rng.randint(2, 20))]
        found.append([*part, *part, *[rng.randrange(256) for _ in range(rng.randint(0, 6))], *part][: rng.randint(1, 60)])
    return found


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0}, {"temperature": 1.0, "seed": 5}, {"temperature": 0.5, "top_p": 0.3, "seed": 6}], ids=str
)
def test_replies_are_those_without_guesses(tiny: Model, sampling: dict[str, Any]) -> None:
    """In plain torch, over chunk borders, six at once: with lookups, and with guesses of which more are right."""
    prompts = looping_prompts(random.Random(1))
    wanted = Sampling(max_tokens=60, ignore_eos=True, **sampling)
    found: list[list[tuple[int, ...]]] = []
    for draft_tokens in (0, 8, 8):
        engine = make_engine(tiny, draft_tokens=draft_tokens, step_tokens=64)
        engine.scheduler.payoff = Cheap(draft_tokens)
        sequences = [engine.sequence(plain_prompt(p), wanted, lambda event: None) for p in prompts]
        found.append(replies(engine, with_oracles(sequences, found[0], random.Random(9)) if len(found) == 2 else sequences))
        assert all(len(reply) == 60 for reply in found[-1])
        if not draft_tokens:
            assert engine.scheduler.tally.drafted_tokens == 0
    assert found[0] == found[1] == found[2]
    assert engine.scheduler.tally.drafted_tokens > engine.scheduler.tally.accepted_tokens > 100


@pytest.mark.skipif(kernels() is None, reason="the native kernels are not built here")
@pytest.mark.parametrize("name", FAMILY)
def test_native_replies_are_those_without_guesses(name: str) -> None:
    """A token's logits have the same bits alone and among drafts, so here it is exact."""
    model = blocks_model(FAMILY[name])
    prompts = looping_prompts(random.Random(2))
    found = []
    for draft_tokens in (0, 8):
        engine, sequences = start(model, prompts, max_tokens=50, draft_tokens=draft_tokens)
        engine.scheduler.payoff = Cheap(draft_tokens)
        assert engine.runner.whole is not None
        found.append(replies(engine, sequences))
    assert found[0] == found[1] and engine.scheduler.tally.accepted_tokens > 0


def test_graphs_make_way_for_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph takes one token for each sequence; steps with drafts run layer by layer between those that are replayed."""
    monkeypatch.setattr("herd.engine.graphs.LEAST_COLUMNS", 16)
    model = init_weights(build(SCOUT, device="cpu"), 0, std=0.15)
    prompts = [prompt[:20] for prompt in looping_prompts(random.Random(3))[:2]]
    found = []
    taken = []
    for draft_tokens in (0, 8):
        engine, sequences = start(model, prompts, max_tokens=40, draft_tokens=draft_tokens)
        graphs = engine.runner.graphs = Graphs(model, engine.pages, traced)

        def takes(inputs: Any, graphs: Graphs = graphs) -> bool:
            taken.append(Graphs.takes(inputs))
            return taken[-1]

        monkeypatch.setattr(graphs, "takes", takes)
        found.append(replies(engine, with_oracles(sequences, found[0], random.Random(9)) if found else sequences))
    assert found[0] == found[1] and engine.scheduler.tally.accepted_tokens > 0
    assert 0 < sum(taken) < len(taken)


def test_one_random_number_for_each_token(tiny: Model) -> None:
    """Whatever was guessed, the generator has moved as far as the reply is long."""
    engine = make_engine(tiny)
    sampling = Sampling(temperature=1.0, seed=3, max_tokens=50, ignore_eos=True)
    known: list[tuple[int, ...]] = []
    for _ in range(2):
        sequences = [engine.sequence(plain_prompt([1, 2, 3] * 8), sampling, lambda event: None)]
        known = replies(engine, with_oracles(sequences, known, random.Random(8)) if known else sequences)
    (sequence,) = sequences
    assert engine.scheduler.tally.accepted_tokens
    generator = torch.Generator().manual_seed(3)
    for _ in range(50):
        torch.rand((), generator=generator, dtype=torch.float64)
    assert torch.equal(sequence.sampler.generator.get_state(), generator.get_state())


def test_free_talk_pays_next_to_nothing() -> None:
    """Random text of few words, where there is always something to guess and it is nearly always wrong: under 2 % more tokens."""
    rng = random.Random(6)
    lookup, payoff = Lookup(8), known(3e-3, 1e-3)
    tokens = [rng.randrange(40) for _ in range(400)]
    for _ in range(2000):
        drafts = lookup.drafts(tokens, 8, payoff)
        tokens.append(rng.randrange(40))
        right = 0
        while right < len(drafts) and drafts[right] == tokens[-1]:
            right += 1
            tokens.append(rng.randrange(40))
        lookup.learn(len(drafts), right)
    assert lookup.num_drafted - lookup.num_accepted < 0.02 * 2000


def test_a_number_of_guesses_that_cannot_be_is_refused(tiny: Model) -> None:
    with pytest.raises(UsageError, match="draft_tokens"):
        make_engine(tiny, draft_tokens=-1)
