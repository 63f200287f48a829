"""Where keys and values live: pages of a few tokens, in two pools.

Global layers keep every token of a sequence, local layers only those of its current chunk, so each kind has its own pool and each
sequence a table of pages per kind. A page of a pool is the same slots in every layer of that kind.

A page that is full and computed is registered under the key of its content (`prefix.py`), and from then on never written again: any
sequence whose prefix has that key may hold it too. When nobody does it is kept until its room is needed, the page that was let go first
first; a sequence lets go of its last page first, so that chains are lost from their ends.
"""

from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable, MutableSequence
from dataclasses import dataclass

import torch

from herd.engine.config import EngineConfig
from herd.engine.mapped import MappedFile, padded
from herd.engine.prefix import resume
from herd.engine.sequence import Sequence
from herd.errors import UsageError
from herd.model.config import ModelConfig
from herd.model.llama4 import Llama4
from herd.model.swap import activation_bits
from herd.ops.attend import Slots

KV_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}


def kept_dtype(config: EngineConfig, model: Llama4) -> torch.dtype:
    """What keys and values are kept in. Where nobody says: as computed, but not finer than fp16 beside 4-bit and 8-bit weights."""
    computed = model.norm.weight.dtype
    return KV_DTYPES.get(config.kv, torch.float16 if activation_bits(model) and computed == torch.float32 else computed)


class PagePool:
    """The pages of one kind of layer: held by sequences, kept for what is in them, or free."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.num_evicted = 0  # pages that were kept and then taken for something else
        self.free = deque(range(num_pages))
        self.kept: OrderedDict[int, None] = OrderedDict()  # registered and held by nobody, those let go first first
        self.holders = [0] * num_pages  # sequences that hold each
        self._page: dict[bytes, int] = {}
        self._key: dict[int, bytes] = {}

    @property
    def room(self) -> int:
        """How many pages can be taken."""
        return len(self.free) + len(self.kept)

    def __contains__(self, key: object) -> bool:
        return key in self._page

    def take(self, count: int) -> list[int]:
        """`count` pages that nobody else holds, for new content. The caller has checked that there are as many."""
        return [self._take() for _ in range(count)]

    def _take(self) -> int:
        if self.free:
            page = self.free.popleft()
        else:
            page, _ = self.kept.popitem(last=False)
            del self._page[self._key.pop(page)]
            self.num_evicted += 1
        self.holders[page] = 1
        return page

    def share(self, keys: Iterable[bytes]) -> list[int]:
        """The pages registered under `keys`, to be read and never written."""
        pages = [self._page[key] for key in keys]
        for page in pages:
            self.holders[page] += 1
            self.kept.pop(page, None)
        return pages

    def register(self, page: int, key: bytes) -> None:
        """Say what a page holds from now on. Where another holds the same already, this one stays its sequence's own."""
        if key not in self._page and page not in self._key:
            self._page[key] = page
            self._key[page] = key

    def give_back(self, pages: MutableSequence[int]) -> None:
        """Let go of `pages`, the last first, and forget them in the caller's list."""
        while pages:
            page = pages.pop()
            assert self.holders[page], "a page was given back twice"
            self.holders[page] -= 1
            if not self.holders[page]:
                if page in self._key:
                    self.kept[page] = None
                else:
                    self.free.append(page)


@dataclass(frozen=True, slots=True)
class Capacity:
    """What an engine can hold."""

    context_tokens: int  # longest sequence
    full_pages: int  # for global layers
    local_pages: int  # for local layers
    window_bytes: int = 0  # of the file that global layers' pages lie in, what may be in memory at once; 0: they lie in memory

    @staticmethod
    def of(model: ModelConfig, config: EngineConfig, dtype: torch.dtype) -> "Capacity":
        """The most that fits in `config.kv_gib`, and in a file where there is one. Raises `UsageError` when a wanted context does not."""
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
        if config.kv_folder is not None and model.global_layers:
            return Capacity._with_file(model, config, page_bytes)
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

    @staticmethod
    def _with_file(model: ModelConfig, config: EngineConfig, page_bytes: int) -> "Capacity":
        """Global pages take what the file may, local ones at most half of the memory; through the rest the file is seen.

        page_bytes: of one layer.
        """
        size, memory = config.page_tokens, int(config.kv_gib * 2**30)
        most = config.context_tokens or model.context_tokens
        full = min(int(config.kv_disk_gib * 2**30) // (page_bytes * len(model.global_layers)), config.max_sequences * -(-most // size))
        tokens, limit = full * size, "kv_disk_gib"
        local = 0
        if model.local_layers:
            wanted = full if model.chunk_tokens is None else min(full, config.max_sequences * model.chunk_tokens // size)
            local = min(wanted, memory // 2 // (page_bytes * len(model.local_layers)))
            if local * size < min(tokens, model.chunk_tokens or tokens):
                tokens, limit = local * size, "kv_gib"
        wanted = config.context_tokens or 2 * size
        if tokens < wanted:
            value = getattr(config, limit)
            raise UsageError(
                f"a context of {wanted:,} tokens does not fit: {limit} is {value}, which holds {tokens:,} tokens with kv_folder",
                f"raise {limit} or lower context_tokens",
                param=limit,
            )
        window = memory - local * page_bytes * len(model.local_layers)
        touched = page_bytes * (-(-max(config.step_tokens, 256) // size) + config.max_sequences)  # of one layer, written or read in one go
        if window < 2 * touched:
            raise UsageError(
                f"kv_gib is {config.kv_gib}, which leaves {window / 2**20:.3g} MiB for what is in use of the file in kv_folder; "
                f"steps of {config.step_tokens} tokens need {2 * touched / 2**20:.3g}",
                "raise kv_gib or lower step_tokens",
                param="kv_gib",
            )
        return Capacity(context_tokens=min(most, tokens), full_pages=full, local_pages=local, window_bytes=window)


class Pages:
    """Keys and values of all layers, the pages of both kinds, and the tables of the sequences that hold them."""

    def __init__(self, model: ModelConfig, config: EngineConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        self.capacity = Capacity.of(model, config, dtype)
        self.page_tokens, self.chunk_tokens = config.page_tokens, model.chunk_tokens
        self.full = PagePool(self.capacity.full_pages)
        self.local = PagePool(self.capacity.local_pages)
        self.has_full, self.has_local = bool(model.global_layers), bool(model.local_layers)
        self._global_share = len(model.global_layers) / model.num_layers
        self.keeps = config.prefix_cache

        shape = (model.num_kv_heads, config.page_tokens, model.head_width)
        self.file = None  # that the pages of global layers lie in
        if self.capacity.window_bytes:
            assert config.kv_folder is not None
            if device.type != "cpu":
                raise UsageError(
                    f"kv_folder is set and the model is on {device.type}", "only a CPU reads keys and values in a file", param="kv_folder"
                )
            one = Slots.of((self.full.num_pages, *shape), dtype, lambda shape, dtype: torch.empty(shape, dtype=dtype, device="meta"))
            self.file = MappedFile(config.kv_folder, len(model.global_layers) * sum(padded(tensor.nbytes) for tensor in one.tensors))

        def room(layer: int) -> Slots:
            if model.is_local(layer):
                return Slots.empty((self.local.num_pages, *shape), dtype=dtype, device=device)
            if self.file is not None:
                return Slots.of((self.full.num_pages, *shape), dtype, self.file.tensor)
            return Slots.empty((self.full.num_pages, *shape), dtype=dtype, device=device)

        self.layers = [room(layer) for layer in range(model.num_layers)]
        self.device = device

    def let_go(self) -> None:
        """Where pages lie in a file, take them out of this process's memory: for who has read or written many."""
        if self.file is not None:
            self.file.let_go()

    def chunk_start(self, position: int) -> int:
        """Where the chunk of a position starts."""
        return position // self.chunk_tokens * self.chunk_tokens if self.chunk_tokens else 0

    def keys_seen(self, position: int) -> float:
        """Earlier tokens that the one at a position attends to, on average over the layers."""
        return position - (1 - self._global_share) * self.chunk_start(position)

    def lacking(self, sequence: Sequence, stop: int) -> tuple[int, int]:
        """Pages of both kinds that the tables lack for tokens up to `stop`, whatever the chunk that lies in."""
        full = -(-stop // self.page_tokens) - len(sequence.full_table) if self.has_full else 0
        local = min(stop - self.chunk_start(sequence.num_computed), self.chunk_tokens or stop)
        return max(0, full), max(0, -(-local // self.page_tokens) - len(sequence.local_table)) if self.has_local else 0

    def grow(self, sequence: Sequence, stop: int) -> bool:
        """Make the tables hold tokens up to `stop`, in the chunk of the next to compute; False, with nothing taken, where room lacks."""
        full, local = self.lacking(sequence, stop)
        if full > self.full.room or local > self.local.room:
            return False
        sequence.full_table.extend(self.full.take(full))
        sequence.local_table.extend(self.local.take(local))
        return True

    def reuse(self, sequence: Sequence) -> int:
        """Take over pages that hold what the sequence has to compute next; how many tokens that saves. The last is always computed."""
        if not self.keeps or not sequence.shares:
            return 0
        size, tokens = self.page_tokens, sequence.tokens
        first = sequence.num_computed // size  # a page that was begun is given up for a full one

        def key(page: int) -> bytes:
            return sequence.chain.key(tokens, page)

        best = resume(
            key,
            range(first, (len(tokens) - 1) // size),
            self.full if self.has_full else None,
            self.local if self.has_local else None,
            self.chunk_tokens // size if self.chunk_tokens else None,
        )
        if best == first:
            return 0
        before, after = self.chunk_start(sequence.num_computed) // size, self.chunk_start(best * size) // size
        if self.has_full:
            self._replace(self.full, sequence.full_table, first, map(key, range(first, best)))
        if self.has_local:
            held = first - before if before == after else 0
            self._replace(self.local, sequence.local_table, held, map(key, range(after + held, best)))
        saved = best * size - sequence.num_computed
        sequence.num_computed = best * size
        return saved

    @staticmethod
    def _replace(pool: PagePool, table: "array[int]", start: int, keys: Iterable[bytes]) -> None:
        """Give back a table from `start` on and let it go on with the pages of `keys`."""
        dropped = table[start:]
        pool.give_back(dropped)
        table[start:] = array("q", pool.share(keys))

    def computed(self, sequence: Sequence, stop: int) -> None:
        """Record that the next tokens up to `stop`, all in one chunk, are computed for good."""
        start, sequence.num_computed = sequence.num_computed, stop
        sequence.num_reached = max(sequence.num_reached, stop)
        size = self.page_tokens
        origin = self.chunk_start(start) // size
        for page, key in enumerate(self.keys(sequence, start, stop // size * size), start // size):
            if self.has_full:
                self.full.register(sequence.full_table[page], key)
            if self.has_local:
                self.local.register(sequence.local_table[page - origin], key)
        if stop == self.chunk_start(stop):  # no later token of a local layer looks back across this border
            self.local.give_back(sequence.local_table)

    def keys(self, sequence: Sequence, start: int, stop: int) -> list[bytes]:
        """Keys of the pages in which tokens [start, stop) lie, of those that the sequence's tokens fill; none where nothing is kept."""
        size = self.page_tokens
        last = min(-(-stop // size), len(sequence.tokens) // size) if self.keeps and sequence.shares else 0
        return [sequence.chain.key(sequence.tokens, page) for page in range(start // size, last)]

    def release(self, sequence: Sequence) -> None:
        """Take all pages from a sequence; what is registered of them can be taken over again."""
        self.full.give_back(sequence.full_table)
        self.local.give_back(sequence.local_table)
        sequence.num_computed = 0
