"""Attention over packed sequences: the seam between the model and where keys and values live.

The model makes q, k and v for a layer and calls `attend(layer, is_local, q, k, v)`; it knows no cache and no batch. `Packed` serves
training and stateless prefill: keys are the tokens at hand. `Paged` serves the engine: it writes k and v into pages and reads each
sequence back through them. Both cut the work into runs of queries that see one run of keys, and both call `causal`, so that they can
differ only in where a key was fetched from.

The chunk of a local layer is aligned to blocks of absolute positions, it is no sliding window: a query at position p sees keys from
floor(p / C) * C to p. Source: Meta's `create_chunked_attention_mask`, transformers' `chunked_overlay`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class Attend(Protocol):
    """Attention of one layer over the packed tokens of a step."""

    def __call__(self, layer: int, is_local: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, H, K], k and v [T, G, K] -> [T, H, K]."""
        ...


def causal_plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The definition of `causal`: q [n, H, K] are the last n positions of the m keys k, v [m, G, K] -> [n, H, K]."""
    n, H, K = q.shape
    m, G, _ = k.shape
    k, v = (x.repeat_interleave(H // G, dim=1) for x in (k, v))  # [m, H, K]
    scores = torch.einsum("nhk,mhk->hnm", q.float(), k.float()) / math.sqrt(K)
    position = torch.arange(m, device=q.device)
    hidden = position > (m - n + torch.arange(n, device=q.device))[:, None]  # [n, m]
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
    return torch.einsum("hnm,mhk->nhk", weights, v.float()).type_as(q)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of the last n of m positions: q [n, H, K], k and v [m, G, K] -> [n, H, K]."""
    n, H, _ = q.shape
    m, G, _ = k.shape
    mask = None
    if 1 < n < m:  # torch aligns `is_causal` to the first key; ours ends at the last
        mask = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # [1, heads, tokens, K]
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=n == m and n > 1,
        enable_gqa=H != G,
    )
    return out.squeeze(0).transpose(0, 1)  # [n, H, K]


class Packed:
    """Attention over whole documents laid end to end; chunks restart at the start of each document."""

    def __init__(self, lengths: Sequence[int], chunk_tokens: int | None) -> None:
        """lengths: tokens of each document, their sum is T.  chunk_tokens: span of a local layer, None for unlimited."""
        self.documents = list(lengths)
        chunk = chunk_tokens or max(lengths)
        self.chunks = [min(chunk, length - start) for length in lengths for start in range(0, length, chunk)]

    def __call__(self, layer: int, is_local: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        del layer
        runs = self.chunks if is_local else self.documents
        if len(runs) == 1:
            return causal(q, k, v)
        return torch.cat([causal(*qkv) for qkv in zip(torch.split(q, runs), torch.split(k, runs), torch.split(v, runs), strict=True)])


@dataclass(frozen=True, slots=True)
class Reach:
    """Where the tokens of a step are written and what each run of them reads, for one kind of layer."""

    write: Tensor  # [T] slot of each new token
    read: list[Tensor]  # per sequence: slots of all its visible keys, oldest first, the new ones last


class Paged:
    """Attention through pages: one pool of slots per layer, shared by all sequences."""

    def __init__(
        self, keys: Sequence[Tensor], values: Sequence[Tensor], counts: Sequence[int], local: Reach | None, full: Reach | None
    ) -> None:
        """keys, values: per layer [slots, G, K], written in place.  counts: new tokens of each sequence, in packed order.

        local, full: for local and for global layers; None where the model has none.
        """
        self.keys, self.values, self.counts, self.local, self.full = keys, values, list(counts), local, full

    def __call__(self, layer: int, is_local: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        reach = self.local if is_local else self.full
        assert reach is not None
        keys, values = self.keys[layer], self.values[layer]
        keys[reach.write] = k.to(keys.dtype)
        values[reach.write] = v.to(values.dtype)
        outs = [
            causal(part, keys[slots].to(q.dtype), values[slots].to(q.dtype))
            for part, slots in zip(torch.split(q, self.counts), reach.read, strict=True)
        ]
        return outs[0] if len(outs) == 1 else torch.cat(outs)


@dataclass(frozen=True, slots=True)
class Table:
    """A `Reach` of one new token for each of B sequences, as tensors of equal rows."""

    write: Tensor  # [B] slot of each new token
    read: Tensor  # [B, M] slots of the visible keys, then the new token's own again: never a slot that nobody has written
    visible: Tensor  # [B, M] bool

    @staticmethod
    def of(reach: Reach, columns: int = 1) -> "Table":
        """columns: the least M."""
        read = pad_sequence(reach.read, batch_first=True, padding_value=-1)
        read = F.pad(read, (0, max(0, columns - read.shape[1])), value=-1)
        visible = read >= 0
        return Table(reach.write, torch.where(visible, read, reach.write[:, None]), visible)


class Together:
    """`Paged` for a step in which every sequence decodes: one call for all of them, under a mask."""

    SPARE_SLOTS = 8192  # padding that is cheap whatever it is beside

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], local: Table | None, full: Table | None) -> None:
        self.keys, self.values, self.local, self.full = keys, values, local, full

    @staticmethod
    def suits(paged: Paged) -> bool:
        """Whether every one of several sequences has one new token, and padding them to the longest no more than doubles what is read."""
        reaches = [[len(slots) for slots in reach.read] for reach in (paged.local, paged.full) if reach]
        wasteful = any(len(lengths) * max(lengths) > 2 * sum(lengths) + Together.SPARE_SLOTS for lengths in reaches)
        return len(paged.counts) > 1 and max(paged.counts) == 1 and not wasteful

    @staticmethod
    def of(paged: Paged) -> "Together":
        local, full = (Table.of(reach) if reach else None for reach in (paged.local, paged.full))
        return Together(paged.keys, paged.values, local, full)

    def __call__(self, layer: int, is_local: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, H, K = q.shape
        table = self.local if is_local else self.full
        assert table is not None
        keys, values = self.keys[layer], self.values[layer]
        keys[table.write] = k.to(keys.dtype)
        values[table.write] = v.to(values.dtype)
        k, v = (pages[table.read].to(q.dtype).transpose(1, 2) for pages in (keys, values))  # [B, G, M, K]
        q = q.reshape(B, k.shape[1], -1, K)  # [B, G, H/G, K]: the query heads that share keys are so many queries of one head
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=table.visible[:, None, None])
        return out.reshape(B, H, K)
