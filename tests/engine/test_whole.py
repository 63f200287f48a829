"""A whole step in one native call against the layer-by-layer forward, and the same bits whatever else is in the batch."""

import random
from dataclasses import replace

import pytest
import torch

from herd.errors import HerdError
from herd.model.presets import TINY
from herd.ops.int4 import kind_of
from herd.ops.native import kernels
from herd.ops.pick import blocks_linear
from herd.quant.int4 import quantize_int8
from tests.engine.made import blocks_model, logits_of, start

SMALL = replace(TINY, width=128, head_width=32, hidden_width=96, dense_width=160, vision=None)
FAMILY = {
    "scout": SMALL,
    "maverick": replace(SMALL, moe_step=2, qk_norm=False, rope_scaling=None),
    "dense": replace(SMALL, num_experts=0, global_step=None, temperature_tuning=False, tied=True),
    "two experts": replace(SMALL, experts_per_token=2),
    "unlimited": replace(SMALL, chunk_tokens=None),
}

pytestmark = pytest.mark.skipif(kernels() is None, reason="the native kernels are not built here")


@pytest.mark.parametrize("name", FAMILY)
def test_one_call_equals_the_forward(name: str) -> None:
    """To a few parts in ten thousand: float32's rounding tips some activations from one of their 16-bit codes to the next."""
    model = blocks_model(FAMILY[name])
    rng = random.Random(1)
    prompts = [[rng.randrange(256) for _ in range(n)] for n in (1, 2, 5, 15, 16, 17, 20, 25, 33, 40, 55, 70)]
    errors = []
    for is_whole in (True, False):
        engine, sequences = start(model, prompts, max_tokens=1, kv="fp32")
        assert engine.runner.whole is not None
        if not is_whole:
            engine.runner.whole = None
        errors.append(torch.stack([rows[0] for rows in logits_of(engine, sequences, random.Random(2)).values()]))
    difference = (errors[0] - errors[1]).abs().amax(-1)
    assert difference.median() < 1e-3 * errors[1].std()
    assert difference.max() < 1e-2 * errors[1].std()


@pytest.mark.parametrize(
    ("kv", "bits", "bound"), [("fp16", 16, 0.05), ("bf16", 16, 0.05), ("int8", 16, 0.05), ("fp32", 8, 0.1), ("int8", 8, 0.1)]
)
def test_one_call_equals_the_forward_in_fewer_bits(kv: str, bits: int, bound: float) -> None:
    """Both round alike; where float32's own rounding tips a number to the next code, the two part by that code."""
    model = blocks_model(FAMILY["scout"], activation_bits=bits)
    rng = random.Random(1)
    prompts = [[rng.randrange(256) for _ in range(n)] for n in (1, 5, 16, 17, 33, 55)]
    found = []
    for is_whole in (True, False):
        engine, sequences = start(model, prompts, max_tokens=1, kv=kv)
        if not is_whole:
            engine.runner.whole = None
        found.append(torch.stack([rows[0] for rows in logits_of(engine, sequences, random.Random(2)).values()]))
    assert (found[0] - found[1]).abs().max() < bound * found[1].std()


@pytest.mark.parametrize("kv", ["fp32", "fp16", "bf16", "int8"])
def test_long_contexts_are_summed_up_span_by_span(kv: str) -> None:
    """Over several spans of keys: equal to the forward, and the same bits however the work was shared out."""
    native = kernels()
    assert native
    model = blocks_model(replace(SMALL, chunk_tokens=None, context_tokens=4096, num_layers=2, global_step=2))
    rng = random.Random(3)
    prompt = [rng.randrange(256) for _ in range(2300)]
    found = []
    for threads, step_tokens in ((1, 512), (3, 512), (2, 64), (64, 2300)):
        native.use_threads(threads)
        engine, (alone,) = start(model, [prompt], max_tokens=4, kv=kv, step_tokens=step_tokens, threads=threads, kv_gib=0.05)
        found.append(torch.stack(logits_of(engine, [alone], None)[alone]))
    native.use_threads(1)
    assert all(torch.equal(other, found[0]) for other in found)
    engine, (alone,) = start(model, [prompt], max_tokens=4, kv=kv, kv_gib=0.05)
    engine.runner.whole = None
    plain = torch.stack(logits_of(engine, [alone], None)[alone])
    assert (found[0] - plain).abs().max() < 0.03 * plain.std()


@pytest.mark.parametrize("name", FAMILY)
def test_a_tokens_logits_do_not_depend_on_its_batch(name: str) -> None:
    """Alone, among others, prefilled in pieces of any size, with any number of threads: the same bits."""
    model = blocks_model(FAMILY[name])
    rng = random.Random(5)
    prompt = [rng.randrange(256) for _ in range(50)]
    engine, (alone,) = start(model, [prompt])
    want = logits_of(engine, [alone], None)[alone]
    native = kernels()
    assert native
    for seed in range(4):
        native.use_threads(1 + seed % 3)
        others = [[rng.randrange(256) for _ in range(rng.randint(1, 60))] for _ in range(3)]
        engine, sequences = start(model, [*others[:2], prompt, others[2]])
        found = logits_of(engine, sequences, random.Random(seed))[sequences[2]]
        assert len(found) == len(want) and all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@pytest.mark.parametrize("kv", ["fp32", "fp16", "bf16", "int8"])
@pytest.mark.parametrize("name", ["layers.0.attention.q.weight", "layers.3.attention.v.weight", "layers.1.ffn.experts.up"])
def test_a_broken_weight_ends_in_an_error_and_not_in_text(name: str, kv: str) -> None:
    """A scale that is NaN reaches the logits through every layer and kind of page."""
    model = blocks_model(FAMILY["scout"])
    blocks = model.state_dict()[name]
    kind = kind_of(blocks)
    blocks[..., kind.code_bytes : kind.code_bytes + 16] = torch.full((8,), torch.nan, dtype=torch.float16).view(torch.uint8)
    engine, (sequence,) = start(model, [[1, 2, 3]], kv=kv)
    engine.scheduler.add(sequence)
    (found,) = engine.step()
    assert found[0] is sequence and isinstance(found[1], HerdError) and "NaN" in found[1].message
    assert engine.scheduler.is_idle and engine.pages.full.room == engine.pages.full.num_pages


def test_batches_of_the_head_are_the_same_bits() -> None:
    blocks = quantize_int8(torch.randn(64, 96))
    x = torch.randn(16, 96)
    assert torch.equal(blocks_linear(x, blocks)[3], blocks_linear(x[3:4], blocks)[0])
