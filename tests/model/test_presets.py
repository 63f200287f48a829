"""The presets are the released models: parameters to the last digit, counted on modules that hold no memory.

Source of the totals: arithmetic from the released configs, confirmed by the sizes of Meta's files and by the model card.
"""

import pytest
import torch

from herd.errors import ModelNotFound
from herd.model.init import init_weights
from herd.model.llama4 import build
from herd.model.presets import GUARD, MAVERICK, PRESETS, SCOUT, TINY, preset
from herd.ops.attend import Packed

VISION = 871_932_416


def count(name: str) -> tuple[int, int]:
    """Parameters of the text half and of the vision half."""
    sizes = {parameter: p.numel() for parameter, p in build(PRESETS[name]).named_parameters()}
    vision = sum(n for parameter, n in sizes.items() if parameter.startswith(("vision.", "projector.")))
    return sum(sizes.values()) - vision, vision


@pytest.mark.parametrize(("name", "text"), [("scout", 107_769_861_120), ("maverick", 400_711_848_960)])
def test_parameters(name: str, text: int) -> None:
    assert count(name) == (text, VISION)


def test_parameters_of_guard() -> None:
    assert sum(count("guard")) == 12_001_097_216


def test_parameters_of_cria_are_those_of_smollm2_135m() -> None:
    assert count("cria") == (134_515_008, 0)


def test_what_sets_the_released_models_apart() -> None:
    assert SCOUT.rope_scaling is not None
    scaling = SCOUT.rope_scaling
    assert (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_tokens) == (16, 1, 1, 8192)
    assert (SCOUT.qk_norm, SCOUT.context_tokens) == (True, 10_485_760)
    assert (MAVERICK.rope_scaling, MAVERICK.qk_norm, MAVERICK.context_tokens) == (None, False, 1_048_576)
    assert (GUARD.chunk_tokens, GUARD.global_step) == (None, None)


@pytest.mark.parametrize("name", ["tiny", "cria"])
@torch.no_grad()
def test_small_presets_run(name: str) -> None:
    config = preset(name)
    model = init_weights(build(config, device="cpu"))
    logits = model(torch.arange(9), torch.arange(9), Packed([9], config.chunk_tokens))
    assert logits.shape == (9, config.vocab_size)
    assert logits.isfinite().all()


def test_init_weights_is_a_function_of_the_seed() -> None:
    first, again, other = (init_weights(build(TINY, device="cpu"), seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.equal(first[name], other[name]) == (t.dim() == 1 and name != "vision.cls") for name, t in first.items())
    assert first["layers.0.attention.q.weight"].std().item() == pytest.approx(0.02, rel=0.05)


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ModelNotFound) as raised:
        preset("maverik")
    assert raised.value.hint == "did you mean 'maverick'?"
    with pytest.raises(ModelNotFound) as raised:
        preset("zzz")
    assert raised.value.hint == "there are: scout, maverick, guard, behemoth, tiny, cria"
