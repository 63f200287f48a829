"""Rotary positions against transformers, complex numbers and exact arithmetic; temperature against its published table."""

from dataclasses import replace

import mpmath
import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama4.configuration_llama4 import Llama4TextConfig, Llama4VisionConfig
from transformers.models.llama4.modeling_llama4 import Llama4VisionRotaryEmbedding

from herd.model.attention import temperature
from herd.model.config import RopeScaling, VisionConfig
from herd.model.presets import MAVERICK, SCOUT
from herd.model.rope import frequencies, rotate, text_angles, vision_angles


def test_scout_slows_pairs_35_to_63_by_16() -> None:
    plain, scaled = frequencies(128, 500000.0, None), frequencies(128, 500000.0, SCOUT.rope_scaling)
    assert torch.equal(scaled[:35], plain[:35])
    assert torch.equal(scaled[35:], plain[35:] / 16)


def test_maverick_scales_nothing() -> None:
    cos, _ = text_angles(MAVERICK, torch.tensor([1]))
    torch.testing.assert_close(cos[0, 0], frequencies(128, 500000.0, None).cos(), atol=1e-7, rtol=0)


@pytest.mark.parametrize("scaling", [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (4.0, 2.0, 8.0, 100), (16.0, 1.0, 1.0, 8192)], ids=str)
@pytest.mark.parametrize(("head_width", "theta"), [(128, 500000.0), (64, 10000.0)])
def test_scaling_equals_transformers(scaling: tuple[float, float, float, int], head_width: int, theta: float) -> None:
    factor, low, high, original = scaling
    ours = frequencies(head_width, theta, RopeScaling(factor=factor, low_freq_factor=low, high_freq_factor=high, original_tokens=original))
    config = Llama4TextConfig(
        head_dim=head_width,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        },
    )
    theirs, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    assert attention_factor == 1.0
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_blend_lies_between_and_touches_both_ends() -> None:
    plain = frequencies(128, 500000.0, None)
    blended = frequencies(128, 500000.0, RopeScaling(factor=8.0, high_freq_factor=4.0))
    wavelength = 2 * torch.pi / plain
    short, long = wavelength < 8192 / 4, wavelength > 8192
    between = ~short & ~long
    assert between.sum() > 3
    assert torch.equal(blended[short], plain[short])
    assert torch.equal(blended[long], plain[long] / 8)
    assert ((blended[between] < plain[between]) & (blended[between] > plain[between] / 8)).all()


def test_no_blend_band_divides_by_nothing() -> None:
    """Also not where a wavelength, here 2 pi, lies on the very border."""
    border = 1 / torch.tensor(2 * torch.pi).item()
    scaling = RopeScaling(factor=16.0, low_freq_factor=border, high_freq_factor=border, original_tokens=1)
    assert frequencies(2, 500000.0, scaling).tolist() == [1 / 16]


@pytest.mark.parametrize("position", [0, 1, 8191, 262_143, 9_999_999, 10_485_759])
def test_angles_are_exact_at_any_position(position: int) -> None:
    """Against 50 digits. The float32 product, which other implementations take, is checked to be far off where it matters."""
    freqs = frequencies(128, 500000.0, SCOUT.rope_scaling)
    cos, sin = text_angles(SCOUT, torch.tensor([position]))
    with mpmath.workdps(50):
        angles = [mpmath.mpf(position) * mpmath.mpf(f) for f in freqs.tolist()]
        exact_cos, exact_sin = ([float(fn(a)) for a in angles] for fn in (mpmath.cos, mpmath.sin))
    torch.testing.assert_close(cos[0, 0], torch.tensor(exact_cos, dtype=torch.float32), atol=1e-7, rtol=0)
    torch.testing.assert_close(sin[0, 0], torch.tensor(exact_sin, dtype=torch.float32), atol=1e-7, rtol=0)
    if position > 9_000_000:
        assert ((position * freqs).cos() - cos[0, 0]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("position", "factor"),
    [
        (0, 1.0),
        (8190, 1.0),
        (8191, 1.069315),
        (16383, 1.109861),
        (65535, 1.219722),
        (131071, 1.283321),
        (262143, 1.349651),
        (1048575, 1.485981),
        (10485759, 1.715540),
    ],
)
def test_temperature(position: int, factor: float) -> None:
    for config in (SCOUT, MAVERICK):
        found = temperature(config, torch.tensor([position]))
        assert found.dtype == torch.float32
        assert found.item() == pytest.approx(factor, abs=1e-6)
    assert temperature(replace(SCOUT, temperature_tuning=False), torch.tensor([position])).item() == 1.0


def test_temperature_steps_where_integers_do() -> None:
    positions = torch.tensor([2**25 - 2, 2**25 - 1, 2**25])  # float32 cannot tell these apart
    before, at, after = temperature(replace(SCOUT, temperature_scale=1e3), positions).tolist()
    assert before < at == after


@pytest.mark.parametrize(
    "config", [VisionConfig(), VisionConfig(width=48, num_heads=3, tile_pixels=56, hidden_width=192)], ids=["real", "small"]
)
def test_vision_angles_equal_transformers(config: VisionConfig) -> None:
    theirs = Llama4VisionRotaryEmbedding(
        Llama4VisionConfig(
            hidden_size=config.width,
            num_attention_heads=config.num_heads,
            image_size=config.tile_pixels,
            patch_size=config.patch_pixels,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        )
    ).freqs_ci
    cos, sin = vision_angles(config)
    assert cos.shape == (config.grid**2 + 1, 1, config.width // config.num_heads // 2)
    torch.testing.assert_close(torch.complex(cos, sin), theirs, atol=1e-6, rtol=0)
    assert (cos[-1] == 1).all(), "the class token is last and does not turn"


def test_rotate_is_complex_multiplication() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 3, 10, generator=generator)
    angles = torch.randn(7, 1, 5, generator=generator) * 10
    turned = rotate(x, angles.cos(), angles.sin())
    expected = torch.view_as_complex(x.unflatten(-1, (5, 2))) * torch.polar(torch.ones(()), angles)
    torch.testing.assert_close(turned, torch.view_as_real(expected).flatten(-2), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_rotate_keeps_the_dtype_and_computes_in_float32() -> None:
    x = torch.randn(4, 2, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    angles = torch.linspace(0, 3, 16).view(4, 1, 4)
    turned = rotate(x, angles.cos(), angles.sin())
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rotate(x.float(), angles.cos(), angles.sin()).bfloat16())


def test_scores_depend_on_distance_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 128, generator=generator)

    def score(p: int, distance: int) -> torch.Tensor:
        q_angles, k_angles = text_angles(SCOUT, torch.tensor([p + distance])), text_angles(SCOUT, torch.tensor([p]))
        return (rotate(q, *q_angles) * rotate(k, *k_angles)).sum()

    for distance in (0, 1, 100, 8191):
        torch.testing.assert_close(score(0, distance), score(10_000_000, distance), atol=2e-5, rtol=0)
