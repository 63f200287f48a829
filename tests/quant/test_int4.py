"""Rounding to codes: how large the error is, that no choice beside ours is better, and what is refused."""

from collections import Counter

import pytest
import torch
from torch import Tensor

from herd.checkpoint.names import herd_shapes
from herd.errors import CheckpointError
from herd.model.presets import PRESETS
from herd.ops.int4 import INT8, KINDS, Kind, dequantize, kind_of, unpack_int4, unpack_int8
from herd.quant.int4 import part_of, plan, quantize, quantize_int4, quantize_int8


def gaussian(N: int = 256, K: int = 4096) -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(0))


def rms_error(weight: Tensor, rounded: Tensor) -> float:
    return ((rounded - weight).square().mean() / weight.square().mean()).sqrt().item()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(Kind(4, 32), 0.0859), (Kind(4, 128), 0.1032), (Kind(4, 32, True), 0.0782), (Kind(4, 128, True), 0.0998), (INT8, 0.0053)],
    ids=str,
)
def test_the_error_on_gaussian_weights(kind: Kind, expected: float) -> None:
    weight = gaussian()
    blocks = quantize(weight, kind)
    assert kind_of(blocks) == kind
    assert rms_error(weight, dequantize(blocks)) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(("group", "expected"), [(32, (0.0970, 0.0948, 0.0937)), (128, (0.1173, 0.1108, 0.1056))])
def test_other_choices_of_the_scale_are_worse(group: int, expected: tuple[float, ...]) -> None:
    """The largest magnitude / 7, / 7.5 and / 8, as others do it."""
    weight = gaussian()
    groups = weight.view(256, -1, group)
    largest = groups.abs().amax(-1, keepdim=True)
    errors = []
    for steps in (7, 7.5, 8):
        scale = (largest / steps).half().float()
        errors.append(rms_error(groups, (groups / scale).round().clamp(-8, 7) * scale))
    assert errors == pytest.approx(expected, rel=0.01)
    assert rms_error(weight, dequantize(quantize_int4(weight, group))) < min(errors)


@pytest.mark.parametrize("kind", KINDS.values(), ids=str)
def test_every_weight_gets_the_nearest_code(kind: Kind) -> None:
    """No other code of its group comes nearer, to float32's precision."""
    weight = gaussian(16, 256) * 0.02
    blocks = quantize(weight, kind)
    codes, scale, minimum = unpack_int4(blocks) if kind.bits == 4 else (*unpack_int8(blocks), None)
    all_codes = torch.arange(16) if kind.bits == 4 else torch.arange(-127, 128)
    step = scale.double()[..., None, None]
    base = minimum.double()[..., None, None] if minimum is not None else -8 * step if kind.bits == 4 else 0
    values = step * all_codes + base  # [N, groups, 1, codes]
    distance = (weight.view(16, -1, kind.group, 1).double() - values).abs()
    chosen = distance.gather(-1, (codes.view(16, -1, kind.group, 1).long() - all_codes[0]))
    assert (chosen <= distance.amin(-1, keepdim=True) + 1e-9).all()


@pytest.mark.parametrize("kind", KINDS.values(), ids=str)
def test_groups_of_one_value(kind: Kind) -> None:
    """Zeros stay zeros; a constant is kept as far as float16 goes; so is next to nothing."""
    for value in (0.0, 0.5, -0.37, 1e-9, 6e4):
        rounded = dequantize(quantize(torch.full((8, kind.group), value), kind))
        assert torch.allclose(rounded, torch.full_like(rounded, value), rtol=1e-3, atol=1e-7), value


def test_the_number_of_largest_magnitude_is_exact() -> None:
    weight = torch.zeros(8, 32)
    weight[:, 3] = torch.tensor([1.0, -1.0, 0.5, -0.25, 3.0, 0.125, -7.0, 8.0])
    assert torch.equal(dequantize(quantize_int4(weight)), weight)


def test_experts_are_matrices_one_by_one() -> None:
    experts = gaussian().view(4, 64, 4096)[..., :256].contiguous()
    for kind in KINDS.values():
        blocks = quantize(experts, kind)
        assert torch.equal(blocks, torch.stack([quantize(expert, kind) for expert in experts]))


def test_half_floats_are_taken() -> None:
    weight = gaussian(8, 64).bfloat16()
    assert torch.equal(quantize_int4(weight), quantize_int4(weight.float()))
    assert torch.equal(quantize_int8(weight), quantize_int8(weight.float()))


@pytest.mark.parametrize("kind", KINDS.values(), ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(kind: Kind, value: float) -> None:
    weight = gaussian(8, 256)
    weight[3, 100] = value
    with pytest.raises(CheckpointError, match=r"layers.3.ffn.up.weight holds NaN or infinity"):
        quantize(weight, kind, name="layers.3.ffn.up.weight")
    with pytest.raises(CheckpointError, match=r"x holds weights too large for a float16 scale"):
        quantize(gaussian(8, 256) * 1e9, kind, name="x")


# --- the plan


def test_the_plan_for_the_family() -> None:
    for name in ("scout", "maverick"):
        for group in (32, 128):
            shapes = herd_shapes(PRESETS[name])
            planned = plan(shapes, group)
            assert planned.unfit == ()
            parts = Counter((part_of(n), str(kind)) for n, kind in planned.kinds.items())
            moe = 48 if name == "scout" else 24
            expected = {"attention": 4 * 48, "shared": 3 * moe, "experts": 3 * moe, "dense": 3 * (48 - moe)}
            assert parts == {(part, f"int4 group {group}"): count for part, count in expected.items() if count} | {
                ("embedding", "int8 group 32"): 1,
                ("head", "int8 group 32"): 1,
            }
            left = [n for n in shapes if n not in planned.kinds]
            assert all("norm" in n or "router" in n or n.startswith(("vision.", "projector.")) for n in left)


def test_what_does_not_divide_is_told() -> None:
    cria = plan(herd_shapes(PRESETS["cria"]), 128)
    assert len(cria.unfit) == 30 * 6  # width 576
    assert [name for name in cria.kinds if name.startswith("layers.7.")] == ["layers.7.ffn.down.weight"]
    assert cria.kinds["embed.weight"] == INT8
