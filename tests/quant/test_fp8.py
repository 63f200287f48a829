"""Rounding to 8-bit floats: held against compressed-tensors and against every other code, how large the error is, what is refused."""

import json

import pytest
import torch

from herd.checkpoint.names import herd_shapes
from herd.errors import CheckpointError
from herd.model.presets import PRESETS
from herd.ops.fp8 import FP8, dequantize
from herd.ops.int4 import INT8
from herd.ops.int4 import dequantize as dequantize_blocks
from herd.quant import fp8, int4
from tests.checkpoint.golden.make_compressed import PATH
from tests.quant.test_int4 import gaussian, rms_error


def test_codes_and_scales_are_those_of_compressed_tensors() -> None:
    golden = json.loads(PATH.read_text())["float32"]
    weight = torch.tensor(golden["given"])
    scale = fp8.scales(weight)
    assert torch.equal(scale, torch.tensor(golden["scale"]))
    assert torch.equal(fp8.quantize(weight, scale).view(torch.uint8), torch.tensor(golden["codes"], dtype=torch.uint8))


def test_every_weight_gets_the_nearest_code() -> None:
    weight = gaussian(16, 256) * 0.02
    scale = fp8.scales(weight)
    rounded = dequantize(fp8.quantize(weight, scale), scale)
    codes = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    codes = codes[codes.isfinite()]
    assert (len(codes), codes.max()) == (254, 448)
    distance = (weight[..., None].double() - codes.double() * scale[..., None].double()).abs()
    assert ((weight - rounded).abs() <= distance.amin(-1) + 1e-9).all()


@pytest.mark.parametrize("columns", [256, 4096])
def test_the_error_on_gaussian_weights(columns: int) -> None:
    """And how little is lost when they become int8 after that, as they do for a CPU."""
    weight = gaussian(K=columns)
    scale = fp8.scales(weight)
    rounded = dequantize(fp8.quantize(weight, scale), scale)
    assert rms_error(weight, rounded) == pytest.approx(0.0264, rel=0.015)
    again = dequantize_blocks(int4.quantize(rounded, INT8))
    assert rms_error(rounded, again) == pytest.approx(0.0054, rel=0.03)
    assert rms_error(weight, again) == pytest.approx(0.0269, rel=0.01)


def test_products_are_exact() -> None:
    weight = gaussian(8, 256)
    scale = fp8.scales(weight)
    assert torch.equal(scale.bfloat16().float(), scale)
    codes = fp8.quantize(weight, scale)
    assert torch.equal(dequantize(codes, scale).double(), codes.double() * scale.double())


def test_rows_of_nothing_and_of_next_to_nothing() -> None:
    for value in (0.0, 1e-42, -1e-30, 0.5, 3e38):
        weight = torch.full((8, 32), value)
        rounded = dequantize(fp8.quantize(weight, fp8.scales(weight)), fp8.scales(weight))
        assert torch.allclose(rounded, weight, rtol=2**-4, atol=1e-40), value


def test_several_scales_in_a_row() -> None:
    codes = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).to(FP8)
    assert dequantize(codes, torch.tensor([[2.0, 10.0]])).tolist() == [[2, 4, 30, 40]]


def test_experts_are_matrices_one_by_one() -> None:
    experts = gaussian().view(4, 64, 4096)
    scale = fp8.scales(experts)
    codes = fp8.quantize(experts, scale)
    for i, expert in enumerate(experts):
        assert torch.equal(scale[i], fp8.scales(expert))
        assert torch.equal(codes[i].view(torch.uint8), fp8.quantize(expert, scale[i]).view(torch.uint8))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(value: float) -> None:
    weight = gaussian(8, 256)
    weight[3, 100] = value
    with pytest.raises(CheckpointError, match=r"layers.3.ffn.up.weight holds NaN or infinity"):
        fp8.scales(weight, name="layers.3.ffn.up.weight")


def test_the_plan_for_the_family() -> None:
    """The feed-forward matrices, as in the published files that llm-compressor made."""
    for name, count in (("scout", 48 * 6), ("maverick", 24 * 6 + 24 * 3), ("guard", 48 * 3)):
        planned = fp8.plan(herd_shapes(PRESETS[name]))
        assert len(planned) == count
        assert all(".ffn." in n and "router" not in n for n in planned)
