"""herd's model equals Hugging Face's `Llama4ForConditionalGeneration` in float32: logits, features, gradients."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from herd.model.config import ModelConfig
from herd.model.llama4 import Llama4, build
from herd.ops.attend import Packed
from tests.model.small import FAMILIES, SCOUT, SHAPES, Prompt, packed_logits, random_model, random_prompt, text_loss
from tests.model.transformers_model import as_transformers, transformers_model

TOLERANCE = 1e-4  # largest difference of a logit; logits have a standard deviation of about 1


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> ModelConfig:
    return FAMILIES[request.param]


def reference_logits(reference: torch.nn.Module, prompt: Prompt) -> Tensor:
    return reference(input_ids=prompt.tokens[None], pixel_values=prompt.pixels, use_cache=False).logits[0]


def pair(config: ModelConfig, seed: int) -> tuple[Llama4, torch.nn.Module]:
    model = random_model(config, seed)
    return model, transformers_model(config, model.state_dict())


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.std() > 0.5, "logits too flat to prove anything"
    assert (ours - theirs).abs().max() <= TOLERANCE
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_logits(family: ModelConfig, shape: str, seed: int) -> None:
    model, reference = pair(replace(family, **SHAPES[shape]), seed)
    for num_text, num_tiles in ((1, 0), (57, 0), (64, 0), (35, 3)):  # the longest three pass through more than three chunks
        prompt = random_prompt(family, num_text, num_tiles, seed)
        assert_same(packed_logits(model, [prompt]), reference_logits(reference, prompt))


@torch.no_grad()
def test_packed_documents_equal_each_alone(family: ModelConfig) -> None:
    model, reference = pair(family, seed=5)
    lengths = [(20, 1), (1, 0), (33, 0), (16, 2), (17, 0)]
    prompts = [random_prompt(family, text, tiles, seed) for seed, (text, tiles) in enumerate(lengths)]
    packed = packed_logits(model, prompts)
    parts = packed.split([len(prompt.tokens) for prompt in prompts])
    for prompt, part in zip(prompts, parts, strict=True):
        assert (part - packed_logits(model, [prompt])).abs().max() <= 1e-5
        assert_same(part, reference_logits(reference, prompt))


@torch.no_grad()
def test_rows_picks_the_tokens_whose_logits_are_wanted(family: ModelConfig) -> None:
    model = random_model(family, seed=6)
    tokens = random_prompt(family, 30).tokens
    rows = torch.tensor([29, 0, 12])
    attend = Packed([30], family.chunk_tokens)
    some = model(tokens, torch.arange(30), attend, rows=rows)
    torch.testing.assert_close(some, model(tokens, torch.arange(30), attend)[rows], atol=1e-6, rtol=0)
    assert some.dtype == torch.float32


@torch.no_grad()
def test_tied_head_is_the_embedding() -> None:
    tied = replace(SCOUT, tied=True)
    model = random_model(tied, seed=7)
    weights = model.state_dict()
    assert "head.weight" not in weights
    reference = transformers_model(tied, weights | {"head.weight": weights["embed.weight"]})
    prompt = random_prompt(tied, 40)
    assert_same(packed_logits(model, [prompt]), reference_logits(reference, prompt))


@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_vision(seed: int) -> None:
    model, reference = pair(SCOUT, seed)
    prompt = random_prompt(SCOUT, 4, num_tiles=5, seed=seed)
    encoded = reference.vision_model(prompt.pixels).last_hidden_state
    features = reference.multi_modal_projector(encoded).flatten(0, 1)
    assert features.std() > 0.1
    torch.testing.assert_close(model.vision(prompt.pixels), encoded, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.see(prompt.tiles), features, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients(family: ModelConfig, shape: str) -> None:
    config = replace(family, **SHAPES[shape])
    model, reference = pair(config, seed=11)
    prompt = random_prompt(config, 40, num_tiles=2, seed=11)
    text_loss(config, packed_logits(model, [prompt]), prompt.tokens).backward()
    text_loss(config, reference_logits(reference, prompt), prompt.tokens).backward()
    ours = as_transformers({name: p.grad for name, p in model.named_parameters()})
    theirs = {name: p.grad for name, p in reference.named_parameters()}
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        scale = grad.abs().max().item()
        assert scale > 1e-6, f"no gradient reaches {name}"
        torch.testing.assert_close(ours[name], grad, rtol=1e-3, atol=1e-4 * scale, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    "change",
    [
        {"qk_norm": False},
        {"rope_scaling": None},
        {"rope_theta": 900.0},
        {"temperature_tuning": False},
        {"temperature_floor": 9},
        {"chunk_tokens": None},
        {"chunk_tokens": 17},
        {"global_step": None},
        {"global_step": 5},
        {"experts_per_token": 2},
        {"norm_eps": 1e-3},
    ],
    ids=str,
)
@torch.no_grad()
def test_every_feature_shows(change: dict[str, object]) -> None:
    """The equalities above could not hold by chance: getting any one fact wrong moves the logits far over the tolerance."""
    model = random_model(SCOUT, seed=0)
    wrong = build(replace(SCOUT, **change), device="cpu")
    wrong.load_state_dict(model.state_dict())
    prompt = random_prompt(SCOUT, 64)
    assert (packed_logits(model, [prompt]) - packed_logits(wrong, [prompt])).abs().max() > 100 * TOLERANCE
