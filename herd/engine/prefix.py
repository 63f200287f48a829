"""What a page holds, as a key, and from which token on a sequence need not be computed.

A key names everything that the keys and values of a full page come from: all tokens from the sequence's first to the page's last, the
pixels behind those that are patches of images, and a salt. It is a hash of the key before it, so equal keys mean equal prefixes, and a
chain of them is matched page by page. The salt keeps tenants apart: who waits less for a prompt learns that somebody has sent it before.

The trap is the local layers. To go on at token n, a global layer needs every page before n, and a local layer those from the start of the
chunk that n lies in: floor(n / C) * C. In the middle of a chunk both must be there; at a border no local page is needed at all.
Source: vLLM's prefix caching of hybrid models works by the same rule.
"""

from array import array
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

from herd.text.images import Tiles


@dataclass(frozen=True, slots=True)
class Placed:
    """An image and the patch tokens that show it."""

    first: int  # position
    last: int
    tiles: Tiles


@dataclass(eq=False, kw_only=True, slots=True)
class Chain:
    """The keys of a sequence's pages, made when they are first asked for."""

    page_tokens: int
    salt: bytes = b""
    images: Sequence[Placed] = ()
    _keys: list[bytes] = field(default_factory=list)
    _digests: dict[int, bytes] = field(default_factory=dict)  # of images that were met, by position

    def key(self, tokens: list[int], page: int) -> bytes:
        """The key of the sequence's page number `page`, which `tokens` must fill."""
        while len(self._keys) <= page:
            start = len(self._keys) * self.page_tokens
            stop = start + self.page_tokens
            assert stop <= len(tokens), "only a full page has a key"
            parent = self._keys[-1] if self._keys else sha256(self.salt).digest()
            seen = [self._digest(image) for image in self.images if image.first < stop and image.last >= start]
            self._keys.append(sha256(b"".join([parent, array("q", tokens[start:stop]).tobytes(), *seen])).digest())
        return self._keys[page]

    def _digest(self, image: Placed) -> bytes:
        if image.first not in self._digests:
            pixels = image.tiles.pixels
            self._digests[image.first] = sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest()
        return self._digests[image.first]


def resume(
    key: Callable[[int], bytes],
    pages: range,
    full: Container[bytes] | None,
    local: Container[bytes] | None,
    chunk_pages: int | None,
) -> int:
    """The page before which nothing has to be computed: the largest that the rule above allows.

    pages: of the sequence, from the first that it does not hold to the last that it may take over.  full, local: the keys at hand for
    global and local layers; None for a kind that the model has not.  chunk_pages: pages in a chunk, None where chunks never end.
    """
    best = pages.start
    is_whole = True  # the local pages from the start of the chunk: those before `pages` the sequence holds itself
    for page in pages:
        if full is not None and key(page) not in full:
            break
        starts, ends = (chunk_pages is not None and at % chunk_pages == 0 for at in (page, page + 1))
        is_whole = (is_whole or starts) and (local is None or key(page) in local)
        if is_whole or ends:
            best = page + 1
        elif chunk_pages is None:
            break
    return best
