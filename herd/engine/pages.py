"""Where keys and values live: pages of a few tokens, in two pools.

Global layers keep every token of a sequence, local layers only those of its current chunk, so each kind has its own pool and each
sequence a table of pages per kind. A page of a pool is the same slots in every layer of that kind.
"""

from collections import deque
from dataclasses import dataclass

import torch

from herd.engine.config import EngineConfig
from herd.errors import UsageError
from herd.model.config import ModelConfig
from herd.ops.attend import Slots

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


class PagePool:
    """The free pages of one kind of layer."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.free = deque(range(num_pages))

    def take(self, count: int) -> list[int]:
        """`count` pages that nobody else holds. The caller has checked that there are as many."""
        return [self.free.popleft() for _ in range(count)]

    def give_back(self, pages: list[int]) -> None:
        """Free `pages`, and forget them in the caller's list."""
        self.free.extend(pages)
        assert len(self.free) <= self.num_pages, "a page was freed twice"
        pages.clear()


@dataclass(frozen=True, slots=True)
class Capacity:
    """What an engine can hold."""

    context_tokens: int  # longest sequence
    full_pages: int  # for global layers
    local_pages: int  # for local layers

    @staticmethod
    def of(model: ModelConfig, config: EngineConfig, dtype: torch.dtype) -> "Capacity":
        """The most that fits in `config.kv_gib`. Raises `UsageError` when a wanted context does not."""
        chunk = model.chunk_tokens
        if chunk is not None and chunk % config.page_tokens:
            raise UsageError(
                f"page_tokens is {config.page_tokens} and does not divide the model's chunk of {chunk} tokens",
                "choose a page_tokens that divides it",
                param="page_tokens",
            )
        page_bytes = Slots.token_bytes(model.num_kv_heads, model.head_width, dtype) * config.page_tokens  # of one layer
        budget = int(config.kv_gib * 2**30)

        def needed(tokens: int) -> tuple[int, int]:
            """Pages of both kinds that `tokens` in all want: local ones for at most a chunk of each sequence."""
            pages = -(-tokens // config.page_tokens)
            most_local = pages if chunk is None else config.max_sequences * chunk // config.page_tokens
            return pages if model.global_layers else 0, min(pages, most_local) if model.local_layers else 0

        def cost(tokens: int) -> int:
            full, local = needed(tokens)
            return page_bytes * (full * len(model.global_layers) + local * len(model.local_layers))

        if config.context_tokens is not None and config.context_tokens > model.context_tokens:
            raise UsageError(
                f"context_tokens is {config.context_tokens:,}; this model was made for {model.context_tokens:,}",
                "lower it, or leave it out",
                param="context_tokens",
            )
        most = config.context_tokens or model.context_tokens
        low, high = 0, config.max_sequences * most
        while low < high:  # the most tokens whose pages fit
            middle = (low + high + 1) // 2
            low, high = (middle, high) if cost(middle) <= budget else (low, middle - 1)
        wanted = config.context_tokens or 2 * config.page_tokens  # with less nobody can be served
        if low < wanted:
            raise UsageError(
                f"a context of {wanted:,} tokens needs {cost(wanted) / 2**30:.2g} GiB of keys and values; "
                f"kv_gib allows {config.kv_gib}, which holds {low:,} tokens",
                "raise kv_gib or lower context_tokens",
                param="kv_gib",
            )
        full, local = needed(low)
        return Capacity(context_tokens=min(most, low), full_pages=full, local_pages=local)


class Pages:
    """Keys and values of all layers, and the free pages of both kinds."""

    def __init__(self, model: ModelConfig, config: EngineConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        dtype = _DTYPES.get(config.kv, dtype)
        self.capacity = Capacity.of(model, config, dtype)
        self.page_tokens = config.page_tokens
        self.full = PagePool(self.capacity.full_pages)
        self.local = PagePool(self.capacity.local_pages)

        def room(layer: int) -> Slots:
            num_pages = self.local.num_pages if model.is_local(layer) else self.full.num_pages
            return Slots.empty((num_pages, model.num_kv_heads, config.page_tokens, model.head_width), dtype=dtype, device=device)

        self.layers = [room(layer) for layer in range(model.num_layers)]
        self.device = device
