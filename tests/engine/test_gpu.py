"""The engine on a CUDA device: the replies of the CPU, decoding by CUDA graphs, and a layer of Scout's own size."""

import random
from dataclasses import replace

import pytest
import torch

from herd.chat import Sampling
from herd.engine.config import EngineConfig
from herd.engine.engine import Engine
from herd.engine.local import Model, load
from herd.model.llama4 import Llama4, build
from herd.model.presets import SCOUT
from herd.model.swap import hold_blocks
from herd.ops import pick
from herd.ops.int4 import Kind
from herd.text.prompt import Prompt
from herd.text.tokenizer import byte_tokenizer
from tests.engine.made import blocks_model, logits_of, start
from tests.engine.test_whole import FAMILY

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
GROUP = Kind(4, 32)


def test_tiny_answers_as_on_the_cpu(tiny: Model) -> None:
    """Greedy, in float32, prompts and replies over several borders of the chunk, alone and many at once."""
    model = load("tiny", device=DEVICE, dtype=torch.float32)
    rng = random.Random(0)
    prompts = [[rng.randrange(256) for _ in range(n)] for n in (1, 15, 16, 17, 40, 70)]
    sampling = Sampling(temperature=0, max_tokens=40, ignore_eos=True)
    replies = [model.generate(prompt, sampling) for prompt in prompts]
    for prompt, reply in zip(prompts, replies, strict=True):
        assert reply.tokens == tiny.generate(prompt, sampling).tokens


@pytest.mark.parametrize("name", FAMILY)
def test_graphs_equal_the_forward(name: str) -> None:
    """Over several borders of the chunk of 16, four sequences of different lengths that end at different times."""
    able, words = pick._triton()
    if not able:
        pytest.skip(f"graphs of experts need a way that does not wait: {words}")
    model = blocks_model(FAMILY[name]).to(DEVICE)
    rng = random.Random(0)
    prompts = [[rng.randrange(256) for _ in range(n)] for n in (1, 14, 30, 33)]
    found = []
    for by_graphs in (True, False):
        engine, sequences = start(model, prompts, max_tokens=40)
        assert engine.runner.graphs is not None
        if not by_graphs:
            engine.runner.graphs = None
        found.append([torch.stack(rows) for rows in logits_of(engine, sequences, None).values()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3)


def scout_layer() -> Llama4:
    """The first layer of Scout with random 4-bit codes, and a small vocabulary: bfloat16 around its blocks."""
    model = build(replace(SCOUT, num_layers=1, vocab_size=1024, vision=None), dtype=torch.bfloat16)
    generator = torch.Generator(DEVICE).manual_seed(0)
    values = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("layers.") and "norm" not in name and "router" not in name:
            shape = GROUP.blocks_shape(tuple(tensor.shape))
            codes = torch.randint(0, 256, (*shape[:-1], GROUP.code_bytes), dtype=torch.uint8, device=DEVICE, generator=generator)
            scale = torch.full((*shape[:-1], 8), 0.004, dtype=torch.float16, device=DEVICE).view(torch.uint8)
            values[name] = torch.cat([codes, scale], -1)
        else:
            random_values = torch.randn(tensor.shape, dtype=torch.bfloat16, device=DEVICE, generator=generator)
            values[name] = torch.ones_like(random_values) if "norm" in name else random_values * 0.02
    hold_blocks(model, {name: tensor for name, tensor in values.items() if tensor.dtype == torch.uint8})
    model.load_state_dict(values, assign=True)
    return model


def test_a_layer_of_scout_fits_and_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill and decoding as blocks, against the same dequantized for the moment of each product."""
    before = torch.cuda.memory_allocated()
    model = scout_layer()
    assert torch.cuda.memory_allocated() - before < 1.5 * 2**30, (
        "16 experts, a shared one and attention are 2.2 G weights of 4.5 bits: 1.2 GiB"
    )
    prompt = [i * 37 % 1024 for i in range(300)]
    found = []
    for is_plain in (False, True):
        engine = Engine(model, byte_tokenizer(), EngineConfig(kv_gib=0.5, max_sequences=4, draft_tokens=0))
        if is_plain:
            engine.runner.graphs = None
            monkeypatch.setattr(pick, "TABLE", [way for way in pick.TABLE if way.is_plain])
            monkeypatch.setattr(pick, "ways", pick.ways.__wrapped__)
        sampling = Sampling(temperature=0, max_tokens=4, ignore_eos=True)
        sequence = engine.sequence(Prompt(tokens=prompt, loss_mask=[False] * len(prompt)), sampling, lambda event: None)
        found.append(torch.stack(logits_of(engine, [sequence], None)[sequence]))
    assert found[0].isfinite().all()
    assert (found[0][0] - found[1][0]).std() < 0.05 * found[1][0].std()
