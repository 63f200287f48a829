#!/usr/bin/env python3
"""Write a few layers of exactly Scout's shape with random int4 weights, as a checkpoint that everything can load: speed without weights.

usage: slice.py LAYERS OUT        1.25 GB a layer; `herd convert OUT OUT.gguf --to gguf` gives llama.cpp the same codes

Per layer: attention 62.9 M, a shared expert of 125.8 M, 16 routed experts of 125.8 M, one of them active. The vocabulary is 2,048, so that
the output matrix does not count. Codes are uniform with a constant scale, norms are 1: the speed is real, the text is not.
"""

import argparse
import dataclasses
from pathlib import Path

import torch

from herd.checkpoint.convert import write
from herd.checkpoint.names import herd_shapes
from herd.checkpoint.source import Source, Stored, of_blocks
from herd.log import show_logs
from herd.model.config import ModelConfig
from herd.model.presets import SCOUT
from herd.ops.int4 import ROWS, Kind
from herd.quant.int4 import plan
from herd.text.tokenizer import byte_tokenizer

SCALE = 0.01


def random_blocks(name: str, shape: tuple[int, ...], kind: Kind, live: range | None = None) -> Stored:
    """Uniform codes; their numbers follow from the name and the place alone. live: the rows that are not 0, in whole blocks; None: all."""
    row_bytes = kind.blocks_shape(shape)[-2] * kind.block_bytes

    def rows(start: int, stop: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(hash_of(name) + start)
        blocks = torch.empty((stop - start, *kind.blocks_shape(shape)[1:]), dtype=torch.uint8)
        few = torch.randint(0, 1 << 62, (min(blocks.numel(), row_bytes * 64) // 8,), generator=generator).view(torch.uint8)
        blocks.view(-1)[: len(few)] = few
        for at in range(len(few), blocks.numel(), len(few)):  # drawing every byte would take minutes
            blocks.view(-1)[at : at + len(few)] = few[: blocks.numel() - at]
        if kind.bits == 8:
            blocks[..., : kind.code_bytes].masked_fill_(blocks[..., : kind.code_bytes] == 128, 0)
        blocks[..., kind.code_bytes :] = torch.full((ROWS,), SCALE if kind.bits == 4 else SCALE / 16, dtype=torch.float16).view(torch.uint8)
        for i in range(start, stop) if live else ():
            if not live.start <= i * ROWS < live.stop:
                blocks[i - start, ..., kind.code_bytes :] = 0
        return blocks

    return of_blocks(Stored(kind.blocks_shape(shape), torch.uint8, rows))


def random_floats(shape: tuple[int, ...], scale: float) -> Stored:
    return Stored(shape, torch.float32, lambda a, b: torch.randn(b - a, *shape[1:], generator=torch.Generator().manual_seed(a)) * scale)


def hash_of(name: str) -> int:
    """The same in every process, unlike `hash`."""
    return int.from_bytes(name.encode()[-7:], "little")


def write_random(config: ModelConfig, out: Path, heads: range | None = None, files: dict[str, bytes] | None = None) -> None:
    """A checkpoint of random blocks for a text model, with the ids of the byte tokenizer; out: the folder, not there yet.

    heads: the ids whose logits are not 0; None: all.  files: of another tokenizer that has those ids.
    """
    ids = {"bos_id": 256, "stop_ids": (257, 260, 261), "pad_id": 262, "patch_id": -1}  # of the byte tokenizer; no images
    config = dataclasses.replace(config, vision=None, **ids)
    shapes = herd_shapes(config)
    kinds = plan(shapes).kinds
    tensors = {}
    for name, shape in shapes.items():
        if name in kinds:
            tensors[name] = random_blocks(name, shape, kinds[name], heads if name == "head.weight" else None)
        elif "norm" in name:
            tensors[name] = Stored(shape, torch.float32, lambda a, b: torch.ones(b - a))
        else:
            tensors[name] = random_floats(shape, 0.02)
    write(Source(config=config, tensors=tensors, files=files or byte_tokenizer().files(), kind="memory"), out, "herd")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layers", type=int)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    show_logs()
    write_random(dataclasses.replace(SCOUT, num_layers=arguments.layers, vocab_size=2048, context_tokens=131072), arguments.out)


if __name__ == "__main__":
    main()
