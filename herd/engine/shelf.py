"""Between pages and the disk: the chunks that global layers have finished go down, and come back for a prefix that memory has forgotten.

Where a chunk ends, a prefix needs the global layers' pages and nothing else (`disk.py`), so that is where it is cut. What comes back is put
into free pages and registered under its keys, as if a sequence had just left them; taking it over is then what it always is.
"""

from torch import Tensor

from herd.engine.disk import DiskStore
from herd.engine.pages import Pages
from herd.engine.sequence import Sequence


class Shelf:
    """The pages of an engine and its store."""

    def __init__(self, pages: Pages, store: DiskStore, global_layers: tuple[int, ...]) -> None:
        assert pages.chunk_tokens is not None and global_layers
        self.pages, self.store, self.layers = pages, store, global_layers
        self.chunk_pages = pages.chunk_tokens // pages.page_tokens
        self.num_restored = 0  # tokens that came back

    def put(self, sequence: Sequence) -> None:
        """Hand the chunk that the sequence has just finished to the store; nothing happens in the middle of one."""
        chunk, rest = divmod(sequence.num_computed, self.chunk_pages * self.pages.page_tokens)
        if rest or not chunk:
            return
        key, parent = (self._key(sequence, end) if end else None for end in (chunk, chunk - 1))
        assert key is not None
        if self.store.has([key]):
            return
        table = sequence.full_table[(chunk - 1) * self.chunk_pages : chunk * self.chunk_pages].tolist()
        parts = {f"{layer}.{name}": held[table].cpu() for layer in self.layers for name, held in self._tensors(layer).items()}
        self.pages.let_go()
        self.store.put(key, parts, parent)

    def restore(self, sequence: Sequence) -> None:
        """Bring back the chunks of the sequence's prefix that are on the disk and not in memory, as far as there is room for them."""
        pool, tokens = self.pages.full, sequence.tokens
        done = sequence.num_computed // (self.chunk_pages * self.pages.page_tokens)
        most = (len(tokens) - 1) // (self.chunk_pages * self.pages.page_tokens)
        if most <= done:
            return
        there = self.store.has([self._key(sequence, end) for end in range(done + 1, most + 1)])
        for chunk in range(done, done + there):
            keys = [sequence.chain.key(tokens, page) for page in range(chunk * self.chunk_pages, (chunk + 1) * self.chunk_pages)]
            if all(key in pool for key in keys):
                continue
            if pool.room < self.chunk_pages * (chunk + 1 - done):  # else it would push out what came before it
                return
            parts = self.store.get(keys[-1])
            if parts is None:
                return
            self._adopt(keys, parts)

    def _adopt(self, keys: list[bytes], parts: dict[str, Tensor]) -> None:
        pages = self.pages.full.take(self.chunk_pages)
        for layer in self.layers:
            for name, held in self._tensors(layer).items():
                held[pages] = parts[f"{layer}.{name}"].to(held.device)
        for page, key in zip(pages, keys, strict=True):
            self.pages.full.register(page, key)
        self.pages.full.give_back(pages)
        self.pages.let_go()
        self.num_restored += self.chunk_pages * self.pages.page_tokens

    def _key(self, sequence: Sequence, chunk: int) -> bytes:
        """The key at the end of so many chunks."""
        return sequence.chain.key(sequence.tokens, chunk * self.chunk_pages - 1)

    def _tensors(self, layer: int) -> dict[str, Tensor]:
        slots = self.pages.layers[layer]
        named = {"keys": slots.keys, "values": slots.values, "key_scales": slots.key_scales, "value_scales": slots.value_scales}
        return {name: tensor for name, tensor in named.items() if tensor is not None}
