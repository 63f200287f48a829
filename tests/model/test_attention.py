"""Rounding of the norms in bfloat16, and what distinguishes local from global layers."""

import pytest
import torch
from torch import Tensor
from transformers.models.llama4.modeling_llama4 import Llama4TextL2Norm, Llama4TextRMSNorm

from herd.model.attention import Attention, Places, RMSNorm, rms
from herd.model.presets import MAVERICK, SCOUT, TINY


def share_of_equal(a: Tensor, b: Tensor) -> float:
    assert a.dtype == b.dtype
    return (a == b).float().mean().item()


@pytest.mark.parametrize("scale", [1e-4, 1.0, 100.0])  # the first makes eps count
def test_norm_rounds_as_transformers_does(scale: float) -> None:
    """Float32, cast, then times the weight: another order would change a third of the results by their last bit."""
    generator = torch.Generator().manual_seed(0)
    x = (scale * torch.randn(50, 128, generator=generator)).bfloat16()
    ours, theirs = RMSNorm(128, 1e-5).bfloat16(), Llama4TextRMSNorm(128, 1e-5).bfloat16()
    with torch.no_grad():
        theirs.weight.copy_(1 + torch.randn(128, generator=generator) / 3)
        ours.weight.copy_(theirs.weight)
    assert share_of_equal(ours(x), theirs(x)) > 0.998
    late = (rms(x.float(), 1e-5) * theirs.weight.float()).bfloat16()
    assert share_of_equal(late, theirs(x)) < 0.9


def test_qk_norm_is_per_head_without_a_weight() -> None:
    x = torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert share_of_equal(rms(x, 1e-5), Llama4TextL2Norm(1e-5)(x)) > 0.995
    torch.testing.assert_close(rms(x.float(), 0.0).square().mean(-1), torch.ones(5, 3))


def test_which_layers_norm_their_queries() -> None:
    def layers_with_norm(config):
        with torch.device("meta"):
            return [layer for layer in range(8) if Attention(config, layer).qk_norm_eps is not None]

    assert layers_with_norm(SCOUT) == [0, 1, 2, 4, 5, 6]
    assert layers_with_norm(MAVERICK) == []


@torch.no_grad()
def test_what_reaches_attend() -> None:
    """Local layers turn q and k and norm both; global layers leave k as projected and scale q. v is never touched."""
    positions = torch.tensor([0, 15, 16, 500])
    places = Places.of(TINY, positions)
    x = torch.randn(4, TINY.width, generator=torch.Generator().manual_seed(0))
    for layer in (2, 3):
        attention = Attention(TINY, layer)
        q, k, v = (proj(x).unflatten(-1, (-1, 16)) for proj in (attention.q, attention.k, attention.v))
        got: list[Tensor] = []

        def attend(layer: int, is_local: bool, q: Tensor, k: Tensor, v: Tensor, got: list[Tensor] = got) -> Tensor:
            assert is_local == (layer == 2)
            got += [q, k, v]
            return q

        attention(x, places, attend)
        assert torch.equal(got[2], v)
        if layer == 2:
            torch.testing.assert_close(got[0].square().mean(-1), torch.ones(4, 4), atol=1e-3, rtol=0)
            torch.testing.assert_close(got[1].square().mean(-1), torch.ones(4, 2), atol=1e-3, rtol=0)
        else:
            factors = [1 + 0.1 * torch.tensor(1 + (p + 1) // 16).log().item() for p in positions.tolist()]
            torch.testing.assert_close(got[0], q * torch.tensor(factors)[:, None, None])
            assert torch.equal(got[1], k)
