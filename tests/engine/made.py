"""Engines and prompts that many tests make, and when an engine holds nothing."""

import random
from typing import Any

import numpy as np
import torch

from herd.chat import Sampling
from herd.engine.config import EngineConfig
from herd.engine.engine import Engine
from herd.engine.local import Model
from herd.engine.sequence import Sequence
from herd.model.config import ModelConfig
from herd.model.init import init_weights
from herd.model.llama4 import Llama4, build
from herd.model.swap import hold_blocks
from herd.quant.int4 import quantize_int4, quantize_int8
from herd.text.images import Tiles, image_tokens
from herd.text.prompt import Prompt
from herd.text.tokenizer import byte_tokenizer

GREEDY = Sampling(temperature=0, top_p=1.0, max_tokens=24)


def plain_prompt(tokens: list[int]) -> Prompt:
    return Prompt(tokens=tokens, loss_mask=[False] * len(tokens), images=())


def random_prompt(rng: random.Random, length: int) -> Prompt:
    return plain_prompt([rng.randrange(256) for _ in range(length)])


def image_prompt(tiny: Model, rng: random.Random) -> Prompt:
    """Text, a 1 x 2 image with its global tile, text."""
    assert tiny.tiling
    pixels = np.random.default_rng(rng.randrange(1000)).integers(0, 256, (3, 56, 56, 3), dtype=np.uint8)
    tiles = Tiles(rows=1, cols=2, pixels=pixels)
    middle = image_tokens(tiles, tiny.tiling, tiny.tokenizer.specials)
    tokens = [*random_prompt(rng, 9).tokens, *middle, *random_prompt(rng, 7).tokens]
    return Prompt(tokens=tokens, loss_mask=[False] * len(tokens), images=(tiles,))


def make_engine(tiny: Model, **choices: int | float) -> Engine:
    return Engine(tiny.llama4, tiny.tokenizer, EngineConfig(**{"page_tokens": 4, "kv_gib": 0.01, **choices}))


def is_clean(engine: Engine) -> bool:
    """Whether nobody holds a page, and every page is either free or kept."""
    pools = (engine.pages.full, engine.pages.local)
    return all(
        not any(pool.holders) and len({*pool.free, *pool.kept}) == len(pool.free) + len(pool.kept) == pool.num_pages for pool in pools
    )


def shrink(engine: Engine, full: int, local: int) -> None:
    """Leave so few pages, in random order, that sequences must give way."""
    for pool, count in ((engine.pages.full, full), (engine.pages.local, local)):
        pages = list(pool.free)
        random.Random(0).shuffle(pages)
        pool.free.clear()
        pool.free.extend(pages[:count])
        pool.num_pages = len(pool.free)


def blocks_model(config: ModelConfig, seed: int = 0, activation_bits: int = 16) -> Llama4:
    """A random model whose matrices are blocks, embedding and head 8-bit."""
    values = {name: tensor.clone() for name, tensor in init_weights(build(config, device="cpu"), seed, std=0.15).state_dict().items()}
    blocks = {}
    for name in values:
        if name in ("embed.weight", "head.weight"):
            blocks[name] = quantize_int8(values[name])
        elif name.startswith("layers.") and "norm" not in name and "router" not in name:
            blocks[name] = quantize_int4(values[name], with_minimum="attention" in name)
    model = build(config)
    hold_blocks(model, blocks, activation_bits)
    model.load_state_dict(values | blocks, assign=True)
    return model


def logits_of(engine: Engine, sequences: list[Sequence], cuts: random.Random | None) -> dict[Sequence, list[torch.Tensor]]:
    """Run to the end; the logits of every drawn token. cuts: choose a new size for every step."""
    seen: dict[Sequence, list[torch.Tensor]] = {s: [] for s in sequences}
    for sequence in sequences:
        engine.scheduler.add(sequence)
    runner = engine.runner

    class Spy:
        def see(self, plan):  # type: ignore[no-untyped-def]
            self.plan = plan

        def __call__(self, inputs):  # type: ignore[no-untyped-def]
            logits = runner(inputs)
            for piece, row in zip(self.plan.due, logits, strict=True):  # without drafts
                seen[piece.sequence].append(row.clone())
            return logits

    engine.runner = Spy()  # type: ignore[assignment]
    while not engine.scheduler.is_idle:
        if cuts:
            object.__setattr__(engine.config, "step_tokens", cuts.randint(4, 40))
        engine.step()
    return seen


def start(model: Llama4, prompts: list[list[int]], max_tokens: int = 10, **choices: Any) -> tuple[Engine, list[Sequence]]:
    engine = Engine(
        model, byte_tokenizer(), EngineConfig(**{"page_tokens": 4, "kv_gib": 0.02, "max_sequences": 4, "draft_tokens": 0, **choices})
    )
    sampling = Sampling(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    return engine, [engine.sequence(Prompt(tokens=p, loss_mask=[False] * len(p)), sampling, lambda event: None) for p in prompts]
