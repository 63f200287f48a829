"""The mean of a prompt's states, from an engine that cuts and mixes prompts, against transformers' last hidden states."""

import random

import pytest
import torch
from transformers import Llama4ForConditionalGeneration

from herd.chat import Sampling
from herd.engine.config import EngineConfig
from herd.engine.engine import Engine
from herd.engine.mean import Mean
from herd.text.prompt import Prompt
from herd.text.tokenizer import byte_tokenizer
from tests.engine.made import blocks_model
from tests.model.small import FAMILIES, random_model
from tests.model.transformers_model import transformers_model

from .test_whole import SMALL

LENGTHS = [1, 2, 15, 16, 17, 40, 70]


@torch.no_grad()
def hidden_mean(reference: Llama4ForConditionalGeneration, tokens: list[int]) -> torch.Tensor:
    states = reference.language_model.model(input_ids=torch.tensor([tokens])).last_hidden_state[0]
    return states.mean(0) / states.mean(0).norm()


def means(engine: Engine, prompts: list[list[int]]) -> list[torch.Tensor]:
    """All of them at once, in the engine."""
    found = [Mean() for _ in prompts]
    for tokens, mean in zip(prompts, found, strict=True):
        prompt = Prompt(tokens=tokens, loss_mask=[False] * len(tokens))
        engine.scheduler.add(engine.sequence(prompt, Sampling(), lambda event: None, mean=mean))
    while not engine.scheduler.is_idle:
        engine.step()
    assert [mean.embedding.num_tokens for mean in found] == [len(tokens) for tokens in prompts]
    return [torch.tensor(mean.embedding.vector) for mean in found]


@pytest.mark.parametrize("name", FAMILIES)
def test_means_are_those_of_transformers(name: str) -> None:
    config, rng = FAMILIES[name], random.Random(0)
    model = random_model(config, seed=3)
    reference = transformers_model(config, model.state_dict())
    engine = Engine(model, byte_tokenizer(), EngineConfig(page_tokens=4, kv_gib=0.02, step_tokens=23))
    prompts = [[rng.randrange(150) for _ in range(length)] for length in LENGTHS]
    for tokens, mean in zip(prompts, means(engine, prompts), strict=True):
        torch.testing.assert_close(mean, hidden_mean(reference, tokens), atol=1e-5, rtol=0)
        assert mean.norm().item() == pytest.approx(1, abs=1e-6)


def test_together_and_one_by_one_are_the_same_on_native_kernels() -> None:
    """To the last bit, however the prompts are cut; and the whole step in one call is the model layer by layer."""
    model, rng = blocks_model(SMALL), random.Random(1)
    prompts = [[rng.randrange(256) for _ in range(length)] for length in LENGTHS]

    def engine(step_tokens: int = 512) -> Engine:
        return Engine(model, byte_tokenizer(), EngineConfig(page_tokens=4, kv_gib=0.02, step_tokens=step_tokens))

    if engine().runner.whole is None:
        pytest.skip("the native kernels are not built here")
    together = means(engine(19), prompts)
    for tokens, mean in zip(prompts, together, strict=True):
        assert torch.equal(means(engine(), [tokens])[0], mean)
    plain = engine()
    plain.runner.whole = None
    for mean, other in zip(together, means(plain, prompts), strict=True):
        assert torch.dot(mean, other) > 0.9999


def test_what_was_taken_up_counts_once() -> None:
    states, mean = torch.randn(10, 6), Mean()
    for start, stop in ((0, 4), (4, 5), (0, 3), (3, 7), (7, 10)):  # after five it gave its pages up
        mean.add(states[start:stop], start)
    total = states.sum(0)
    torch.testing.assert_close(torch.tensor(mean.embedding.vector), total / total.norm(), atol=1e-6, rtol=0)
