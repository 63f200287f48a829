"""Attention over packed sequences: the seam between the model and where keys and values live.

The model makes q, k and v for a layer and calls `attend(layer, is_local, q, k, v)`; it knows no cache and no batch. `Packed` serves
training and stateless prefill: keys are the tokens at hand. `Paged` serves the engine: it writes k and v into pages and reads each
sequence back through them. Both cut the work into runs of queries that see one run of keys, and both call `causal`, so that they can
differ only in where a key was fetched from.

The chunk of a local layer is aligned to blocks of absolute positions, it is no sliding window: a query at position p sees keys from
floor(p / C) * C to p. Source: Meta's `create_chunked_attention_mask`, transformers' `chunked_overlay`.
"""

import math
from collections.abc import Callable, Sequence
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
    """What each sequence of a step sees in one kind of layer. Its new tokens are the last that it sees, and are written there."""

    tables: Sequence[Sequence[int]]  # per sequence: the pages of all its visible keys, oldest first
    lengths: list[int]  # per sequence: how many keys that are
    page_tokens: int

    def slots(self, device: torch.device) -> list[Tensor]:
        """Per sequence: the slots of its visible keys, oldest first."""
        found = []
        for table, length in zip(self.tables, self.lengths, strict=True):
            pages = torch.tensor(table[: -(-length // self.page_tokens)], dtype=torch.int64, device=device)
            found.append((pages[:, None] * self.page_tokens + torch.arange(self.page_tokens, device=device)).flatten()[:length])
        return found


@dataclass(frozen=True, slots=True)
class Slots:
    """Keys and values of one layer: in floats, or in int8 codes of -127..127 with one scale for each token and head.

    Slot i is in page i // S. A head's keys of a page lie together, so that attention, which goes head by head, reads memory in order.
    """

    keys: Tensor  # [P, G, S, K]
    values: Tensor
    key_scales: Tensor | None = None  # [P, G, S] float32
    value_scales: Tensor | None = None

    @staticmethod
    def empty(shape: tuple[int, int, int, int], *, dtype: torch.dtype, device: torch.device) -> "Slots":
        """shape: [P, G, S, K]. `empty`: the system hands out memory when a page is first written."""
        return Slots.of(shape, dtype, lambda shape, dtype: torch.empty(shape, dtype=dtype, device=device))

    @staticmethod
    def of(shape: tuple[int, int, int, int], dtype: torch.dtype, allot: Callable[[tuple[int, ...], torch.dtype], Tensor]) -> "Slots":
        """shape: [P, G, S, K].  allot: gives a tensor of a shape and a dtype."""
        made = [allot(shape, dtype) for _ in range(2)]
        if dtype == torch.int8:
            made += [allot(shape[:-1], torch.float32) for _ in range(2)]
        return Slots(*made)

    @property
    def tensors(self) -> list[Tensor]:
        """All that there are."""
        return [tensor for tensor in (self.keys, self.values, self.key_scales, self.value_scales) if tensor is not None]

    @staticmethod
    def token_bytes(num_kv_heads: int, head_width: int, dtype: torch.dtype) -> int:
        """Bytes of one token in one layer."""
        return 2 * num_kv_heads * (head_width * dtype.itemsize + (4 if dtype == torch.int8 else 0))

    def write(self, at: Tensor, k: Tensor, v: Tensor) -> None:
        """k, v [n, G, K] into the slots `at` [n]."""
        page, place = at // self.keys.shape[2], at % self.keys.shape[2]
        for x, out, scales in ((k, self.keys, self.key_scales), (v, self.values, self.value_scales)):
            if scales is None:
                out[page, :, place] = x.to(out.dtype)
            else:
                scale = x.float().abs().amax(-1) / 127  # [n, G]
                inverse = 1 / scale
                scales[page, :, place] = scale
                out[page, :, place] = (x.float() * torch.where(inverse.isfinite(), inverse, 0)[..., None]).round().to(torch.int8)

    def read(self, at: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values in the slots `at` [m], in order: [m, G, K] each."""
        page, place = at // self.keys.shape[2], at % self.keys.shape[2]
        keys, values = self.keys[page, :, place], self.values[page, :, place]
        if self.key_scales is not None and self.value_scales is not None:
            keys = keys * self.key_scales[page, :, place][..., None]
            values = values * self.value_scales[page, :, place][..., None]
        return keys.to(dtype), values.to(dtype)


class Paged:
    """Attention through pages: one pool of slots per layer, shared by all sequences."""

    def __init__(self, slots: Sequence[Slots], counts: Sequence[int], local: Reach | None, full: Reach | None) -> None:
        """slots: of each layer, written in place.  counts: new tokens of each sequence, in packed order.

        local, full: for local and for global layers; None where the model has none.
        """
        self.slots, self.counts, self.local, self.full = slots, list(counts), local, full
        self._seen: dict[bool, list[Tensor]] = {}  # slots, by whether layers are local: the same in all of a kind

    def __call__(self, layer: int, is_local: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if is_local not in self._seen:
            reach = self.local if is_local else self.full
            assert reach is not None
            self._seen[is_local] = reach.slots(q.device)
        seen, slots = self._seen[is_local], self.slots[layer]
        slots.write(torch.cat([s[len(s) - count :] for s, count in zip(seen, self.counts, strict=True)]), k, v)
        outs = [causal(part, *slots.read(s, q.dtype)) for part, s in zip(torch.split(q, self.counts), seen, strict=True)]
        return outs[0] if len(outs) == 1 else torch.cat(outs)


@dataclass(frozen=True, slots=True)
class Table:
    """A `Reach` of one new token for each of B sequences, as tensors of equal rows."""

    write: Tensor  # [B] slot of each new token
    read: Tensor  # [B, M] slots of the visible keys, then the new token's own again: never a slot that nobody has written
    visible: Tensor  # [B, M] bool

    @staticmethod
    def of(reach: Reach, device: torch.device, columns: int = 1) -> "Table":
        """columns: the least M."""
        seen = reach.slots(device)
        write = torch.stack([slots[-1] for slots in seen])
        read = pad_sequence(seen, batch_first=True, padding_value=-1)
        read = F.pad(read, (0, max(0, columns - read.shape[1])), value=-1)
        visible = read >= 0
        return Table(write, torch.where(visible, read, write[:, None]), visible)


class Together:
    """`Paged` for a step in which every sequence decodes: one call for all of them, under a mask."""

    SPARE_SLOTS = 8192  # padding that is cheap whatever it is beside

    def __init__(self, slots: Sequence[Slots], local: Table | None, full: Table | None) -> None:
        self.slots, self.local, self.full = slots, local, full

    @staticmethod
    def suits(paged: Paged) -> bool:
        """Whether every one of several sequences has one new token, and padding them to the longest no more than doubles what is read."""
        reaches = [reach.lengths for reach in (paged.local, paged.full) if reach]
        wasteful = any(len(lengths) * max(lengths) > 2 * sum(lengths) + Together.SPARE_SLOTS for lengths in reaches)
        return len(paged.counts) > 1 and max(paged.counts) == 1 and not wasteful

    @staticmethod
    def of(paged: Paged) -> "Together":
        device = paged.slots[0].keys.device
        return Together(paged.slots, *(Table.of(reach, device) if reach else None for reach in (paged.local, paged.full)))

    def __call__(self, layer: int, is_local: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, H, K = q.shape
        table = self.local if is_local else self.full
        assert table is not None
        slots = self.slots[layer]
        slots.write(table.write, k, v)
        k, v = (x.transpose(1, 2) for x in slots.read(table.read, q.dtype))  # [B, G, M, K]
        q = q.reshape(B, k.shape[1], -1, K)  # [B, G, H/G, K]: the query heads that share keys are so many queries of one head
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=table.visible[:, None, None])
        return out.reshape(B, H, K)
