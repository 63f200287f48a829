"""Logits of a long prompt by another road than the engine's: no pages, no native kernels, no blocks.

For the model of `long.py`, whose one global layer lies between local ones. Local layers are computed chunk by chunk by torch's attention;
the global layer at a few positions only, over blocks of keys whose sums are joined in float64.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from herd.model.attention import Places
from herd.model.llama4 import Llama4, build
from herd.ops.attend import Packed
from herd.ops.int4 import dequantize

GLOBAL = 3  # the layer


def plain_model(blocks: Llama4) -> Llama4:
    """The same weights as plain floats."""
    model = build(blocks.config, device="cpu")
    wanted = {name: p.shape for name, p in model.named_parameters()}
    values = {name: dequantize(t, torch.float32) if t.dtype == torch.uint8 else t for name, t in blocks.state_dict().items()}
    model.load_state_dict({name: value.view(wanted[name]) for name, value in values.items()})
    return model.eval()


class Caught:
    """Attention that only takes down its keys and values."""

    def __call__(self, layer: int, is_local: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        del layer, is_local
        self.k, self.v = k, v
        return torch.zeros_like(q)


class Full:
    """Attention of a few queries from position `start` on to all keys [m, K] before them and their own, block by block."""

    def __init__(self, keys: Tensor, values: Tensor, start: int, block: int, without: int | None = None) -> None:
        self.keys, self.values, self.start, self.block, self.without = keys, values, start, block, without

    def __call__(self, layer: int, is_local: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        del layer, is_local, k, v
        return torch.cat([self.some(part, self.start + 128 * i) for i, part in enumerate(q.split(128))])

    def some(self, q: Tensor, start: int) -> Tensor:
        """q: [n, H, K] from position `start` on -> [n, H, K]."""
        n, H, K = q.shape
        rows = q.reshape(n * H, K) / math.sqrt(K)
        position = torch.arange(start, start + n).repeat_interleave(H)[:, None]
        most = torch.full((n * H, 1), -math.inf, dtype=torch.float64)
        total, acc = torch.zeros(n * H, 1, dtype=torch.float64), torch.zeros(n * H, K, dtype=torch.float64)
        for first in range(0, start + n, self.block):
            if first // self.block == self.without:
                continue
            keys, values = self.keys[first : min(start + n, first + self.block)], self.values[first : min(start + n, first + self.block)]
            scores = rows @ keys.T  # [n * H, block]
            if first + len(keys) > start:
                scores.masked_fill_(torch.arange(first, first + len(keys)) > position, -math.inf)
            largest = torch.maximum(most, scores.amax(1, keepdim=True).double())
            weights = scores.sub_(largest.float()).exp_()
            keep = (most - largest).exp()
            # what float32 rounds of `largest` is the same in both sums of this block and of no account
            total, acc, most = total * keep + weights.sum(1, keepdim=True).double(), acc * keep + (weights @ values).double(), largest
        return (acc / total).float().view(n, H, K)


class Road:
    """The keys and values that the global layer keeps, grown chunk by chunk, and logits from them."""

    def __init__(self, model: Llama4) -> None:
        config = model.config
        assert config.global_layers == (GLOBAL,) and config.chunk_tokens is not None and config.num_kv_heads == 1
        self.model, self.chunk = model, config.chunk_tokens
        self.keys, self.values = torch.empty(0, config.head_width), torch.empty(0, config.head_width)

    def local(self, start: int, tokens: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """A chunk or its beginning, up to the global layer: what comes to it [n, D], and the keys and values [n, K] that it makes."""
        places = Places.of(self.model.config, torch.arange(start, start + len(tokens)))
        x = self.model.embed(torch.tensor(tokens))
        for block in self.model.layers[:GLOBAL]:
            x = block(x, places, Packed([len(tokens)], None))
        block, caught = self.model.layers[GLOBAL], Caught()
        block.attention(block.attention_norm(x), places, caught)
        return x, caught.k[:, 0], caught.v[:, 0]

    def logits(self, x: Tensor, start: int, without: int | None = None) -> Tensor:
        """From what comes to the global layer from a chunk's start on: [n, D] -> [n, V]. without: a chunk whose keys are left out."""
        places = Places.of(self.model.config, torch.arange(start, start + len(x)))
        x = self.model.layers[GLOBAL](x, places, Full(self.keys, self.values, start, self.chunk, without))
        for block in self.model.layers[GLOBAL + 1 :]:
            x = block(x, places, Packed([len(x)], None))
        return self.model.logits(x)


@torch.inference_mode()
def reference(
    model: Llama4, tokens: list[int], positions: list[int], reply: int, say: Callable[[str], object] = str
) -> tuple[dict[int, Tensor], tuple[int, list[Tensor]]]:
    """Logits at positions of a prompt of whole chunks, its last among them, and at those of a greedy reply.

    Then, for the first position in the second half that starts a chunk: which that is, and its logits without each chunk of keys before.
    """
    road, chunk = Road(model), model.config.chunk_tokens or 0
    assert len(tokens) % chunk == 0 and len(tokens) - 1 in positions
    ends: dict[int, int] = {}  # by chunk, past the last position that lies in it
    for position in positions:
        ends[position // chunk] = max(position + 1, ends.get(position // chunk, 0))
    before: dict[int, Tensor] = {}
    parts = []
    for start in range(0, len(tokens), chunk):
        x, *kept = road.local(start, tokens[start : start + chunk])
        parts.append(kept)
        if start // chunk in ends:
            before[start // chunk] = x[: ends[start // chunk] - start]
        say(f"local layers of {start + chunk:,} tokens")
    road.keys, road.values = (torch.cat(each) for each in zip(*parts, strict=True))
    found: dict[int, Tensor] = {}
    for c, x in before.items():
        rows = road.logits(x, c * chunk)
        found |= {position: rows[position - c * chunk] for position in positions if position // chunk == c}
        say(f"all layers at positions in chunk {c}")
    said = [int(found[len(tokens) - 1].argmax())]
    keys, values = road.keys, road.values
    while len(said) < reply:
        x, new_keys, new_values = road.local(len(tokens), said)
        road.keys, road.values = torch.cat([keys, new_keys]), torch.cat([values, new_values])
        found[len(tokens) + len(said) - 1] = road.logits(x, len(tokens))[-1]
        said.append(int(found[len(tokens) + len(said) - 1].argmax()))
    probe = next(p for p in positions if p >= len(tokens) // 2 and p % chunk == 0)
    return found, (probe, [road.logits(before[probe // chunk], probe, without)[0] for without in range(probe // chunk)])
