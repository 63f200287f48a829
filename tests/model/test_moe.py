"""The sparse layer against every expert run on every token, and what a router and its experts must and must not do."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from herd.model.config import ModelConfig
from herd.model.moe import MoE, SwiGLU
from herd.model.presets import TINY

SMALL = replace(TINY, width=16, hidden_width=24, num_experts=6)


@torch.no_grad()
def random_moe(config: ModelConfig, seed: int = 0) -> MoE:
    moe = MoE(config)
    generator = torch.Generator().manual_seed(seed)
    for p in moe.parameters():
        p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return moe


def rows(num_tokens: int, config: ModelConfig = SMALL, seed: int = 1) -> Tensor:
    return torch.randn(num_tokens, config.width, generator=torch.Generator().manual_seed(seed))


def expert(moe: MoE, e: int, u: Tensor) -> Tensor:
    gate, up, down = moe.experts.gate[e], moe.experts.up[e], moe.experts.down[e]
    return (F.silu(u @ gate.T) * (u @ up.T)) @ down.T


def dense_moe(moe: MoE, x: Tensor) -> Tensor:
    """Every expert on every token, in the form of Meta's reference: scores that were not chosen are sigmoid(-inf) = 0."""
    z = x @ moe.router.weight.T
    kept = torch.full_like(z, -torch.inf)
    for t in range(len(x)):
        for e in sorted(range(moe.num_experts), key=lambda e: (-z[t, e].item(), e))[: moe.experts_per_token]:
            kept[t, e] = z[t, e]
    scores = kept.sigmoid()
    shared = (F.silu(x @ moe.shared.gate.weight.T) * (x @ moe.shared.up.weight.T)) @ moe.shared.down.weight.T
    return shared + sum(expert(moe, e, scores[:, e, None] * x) for e in range(moe.num_experts))


@pytest.mark.parametrize("k", [1, 2, 6])
@pytest.mark.parametrize("num_tokens", [1, 2, 37])
def test_sparse_equals_dense(k: int, num_tokens: int) -> None:
    moe = random_moe(replace(SMALL, experts_per_token=k))
    x = rows(num_tokens).requires_grad_()
    ours, theirs = moe(x), dense_moe(moe, x)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    upstream = rows(num_tokens, seed=2)
    leaves = [x, *moe.parameters()]
    for a, b in zip(torch.autograd.grad(ours, leaves, upstream), torch.autograd.grad(theirs, leaves, upstream), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_score_scales_the_input_and_that_matters() -> None:
    moe = random_moe(SMALL)
    x = rows(20)
    scores, chosen = moe.route(x)
    routed = moe(x) - moe.shared(x)
    inside = torch.cat([expert(moe, e, g * row) for row, g, e in zip(x.split(1), scores, chosen[:, 0].tolist(), strict=True)])
    outside = torch.cat([g * expert(moe, e, row) for row, g, e in zip(x.split(1), scores, chosen[:, 0].tolist(), strict=True)])
    torch.testing.assert_close(routed, inside, atol=1e-5, rtol=1e-5)
    assert (routed - outside).abs().max() > 0.1


def test_scores_are_sigmoids_and_not_renormalised() -> None:
    moe = random_moe(replace(SMALL, experts_per_token=3))
    x = rows(50)
    scores, chosen = moe.route(x)
    torch.testing.assert_close(scores, moe.router(x).gather(-1, chosen).sigmoid())
    assert (scores.sum(-1) - 1).abs().max() > 0.1


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("num_experts", [5, 16, 128])
def test_ties_go_to_the_lowest_expert(k: int, num_experts: int) -> None:
    moe = random_moe(replace(SMALL, num_experts=num_experts, experts_per_token=k))
    with torch.no_grad():
        moe.router.weight.zero_()
    assert moe.route(rows(33))[1].tolist() == [list(range(k))] * 33
    with torch.no_grad():
        moe.router.weight[[num_experts - 3, num_experts - 1], 0] = 1.0  # two winners, equal to the last bit
    _, chosen = moe.route(rows(33).abs())
    assert (chosen[:, 0] == num_experts - 3).all()
    if k > 1:
        assert (chosen[:, 1] == num_experts - 1).all()


def test_all_tokens_to_one_expert() -> None:
    moe = random_moe(SMALL)
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[4] = 1.0
    x = rows(12).abs()
    assert (moe.route(x)[1] == 4).all()
    torch.testing.assert_close(moe(x), dense_moe(moe, x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("k", [1, 2])
def test_no_expert_touches_a_token_that_it_does_not_serve(k: int) -> None:
    """Broken weights in the experts that nobody chose reach neither the output nor any gradient."""
    moe = random_moe(replace(SMALL, num_experts=16, experts_per_token=k))
    x = rows(5)
    used = set(moe.route(x)[1].flatten().tolist())
    unused = [e for e in range(16) if e not in used]
    assert len(unused) >= 6
    clean = moe(x)
    with torch.no_grad():
        for weight in moe.experts.parameters():
            weight[unused] = torch.nan
    out = moe(x)
    assert torch.equal(out, clean)
    out.square().sum().backward()
    for name, p in moe.named_parameters():
        assert p.grad is not None
        assert p.grad.isfinite().all(), name
    for weight in moe.experts.parameters():
        assert (weight.grad[unused] == 0).all()
        assert all(weight.grad[e].abs().max() > 0 for e in used)


def test_gradient_reaches_router_and_input_through_the_experts() -> None:
    moe = random_moe(SMALL)
    with torch.no_grad():
        moe.shared.down.weight.zero_()  # so that what arrives came through the experts
    x = rows(20).requires_grad_()
    moe(x).sum().backward()
    assert x.grad is not None
    assert (x.grad.abs().sum(-1) > 0).all()
    router_grad = moe.router.weight.grad
    chosen = set(moe.route(x)[1].flatten().tolist())
    assert router_grad is not None
    assert all((router_grad[e].abs().max() > 0) == (e in chosen) for e in range(SMALL.num_experts))


def test_bfloat16_stays_near_float32() -> None:
    moe = random_moe(SMALL)
    x = rows(30).bfloat16()
    exact = moe.bfloat16().float()
    expected = exact(x.float())
    found = exact.bfloat16()(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0.05)


def test_swiglu() -> None:
    mlp = SwiGLU(3, 5)
    x = rows(4, replace(SMALL, width=3))
    torch.testing.assert_close(mlp(x), (F.silu(x @ mlp.gate.weight.T) * (x @ mlp.up.weight.T)) @ mlp.down.weight.T)
