"""Attention: the fast kernel against its definition, packed documents against a mask drawn by hand, pages against packed documents."""

import math
import random
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from herd.ops.attend import Packed, Paged, Reach, Slots, Table, Together, causal, causal_plain

HEADS = [(1, 1), (4, 4), (6, 2), (5, 1)]  # of queries, of keys


def qkv(n: int, m: int, H: int, G: int, K: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator) for shape in ((n, H, K), (m, G, K), (m, G, K)))


def brute_force(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """One query, one head at a time, in float64, over the keys that `allowed` [T, T] lets it see."""
    out = torch.empty_like(q, dtype=torch.float64)
    group = q.shape[1] // k.shape[1]
    for t in range(q.shape[0]):
        keys, values = k[allowed[t]].double(), v[allowed[t]].double()
        for h in range(q.shape[1]):
            weights = (keys[:, h // group] @ q[t, h].double() / math.sqrt(q.shape[2])).softmax(0)
            out[t, h] = weights @ values[:, h // group]
    return out.float()


@pytest.mark.parametrize(("n", "m"), [(n, m) for m in (1, 2, 7, 33) for n in sorted({1, 2, m // 2, m - 1, m}) if 1 <= n <= m])
@pytest.mark.parametrize(("H", "G"), HEADS)
@pytest.mark.parametrize("K", [2, 8, 16])
def test_causal_equals_plain(n: int, m: int, H: int, G: int, K: int) -> None:
    inputs = [x.requires_grad_() for x in qkv(n, m, H, G, K)]
    fast, plain = causal(*inputs), causal_plain(*inputs)
    assert fast.shape == (n, H, K)
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-5)
    upstream = torch.randn(n, H, K, generator=torch.Generator().manual_seed(1))
    for a, b in zip(torch.autograd.grad(fast, inputs, upstream), torch.autograd.grad(plain, inputs, upstream), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 9), (4, 9), (9, 9)])
@pytest.mark.parametrize(("H", "G"), HEADS)
def test_plain_is_the_definition(n: int, m: int, H: int, G: int) -> None:
    q, k, v = qkv(m, m, H, G, 8)
    expected = brute_force(q, k, v, torch.ones(m, m, dtype=torch.bool).tril())[-n:]
    torch.testing.assert_close(causal_plain(q[-n:], k, v), expected, atol=1e-5, rtol=1e-5)


def test_causal_in_bfloat16() -> None:
    q, k, v = (x.bfloat16() for x in qkv(5, 12, 4, 2, 16))
    assert causal(q, k, v).dtype == causal_plain(q, k, v).dtype == torch.bfloat16
    torch.testing.assert_close(causal(q, k, v), causal_plain(q, k, v), atol=0.03, rtol=0.03)


def packed_mask(lengths: list[int], chunk: int | None) -> Tensor:
    """allow(q, k): the same document, k not after q, and on a local layer the same block of `chunk` positions of it."""
    places = [(document, position) for document, length in enumerate(lengths) for position in range(length)]
    return torch.tensor(
        [[d == e and j <= i and (chunk is None or i // chunk == j // chunk) for e, j in places] for d, i in places], dtype=torch.bool
    )


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.none() | st.integers(1, 45), st.sampled_from(HEADS), st.integers(0, 2**32))
def test_packed_equals_brute_force(lengths: list[int], chunk: int | None, heads: tuple[int, int], seed: int) -> None:
    q, k, v = qkv(sum(lengths), sum(lengths), *heads, 4, seed)
    attend = Packed(lengths, chunk)
    for is_local, span in ((True, chunk), (False, None)):
        expected = brute_force(q, k, v, packed_mask(lengths, span))
        torch.testing.assert_close(attend(0, is_local, q, k, v), expected, atol=1e-5, rtol=1e-5)


def test_chunks_are_blocks_and_no_sliding_window() -> None:
    """The border that a sliding window would miss: 8191 sees 8192 keys, 8192 sees itself."""
    q = k = torch.zeros(8200, 1, 1)
    v = torch.ones(8200, 1, 1)
    v[8191] = 1000.0
    out = Packed([8200], 8192)(0, True, q, k, v).flatten()
    assert out[8191].item() == pytest.approx((8191 + 1000) / 8192, rel=1e-5)
    assert out[8192].item() == 1.0
    assert Packed([8200], 8192)(0, False, q, k, v).flatten()[8192].item() == pytest.approx((8192 + 1000) / 8193, rel=1e-5)


@dataclass
class Served:
    """One sequence as an engine would serve it: a slot for every position on global layers, a ring of one chunk on local layers."""

    length: int
    chunk: int
    full: list[int]
    ring: list[int]
    done: int = 0
    outs: dict[bool, list[Tensor]] = field(default_factory=lambda: {True: [], False: []})

    def runs(self, cut: int) -> tuple[range, list[int], list[int]]:
        """The next at most `cut` positions, not past the border of a chunk; local and global slots to read."""
        start = self.done
        border = (start // self.chunk + 1) * self.chunk
        new = range(start, min(start + cut, self.length, border))
        local = [self.ring[p % self.chunk] for p in range(start // self.chunk * self.chunk, new.stop)]
        self.done = new.stop
        return new, local, self.full[: new.stop]


@settings(deadline=None, max_examples=50)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    chunk=st.integers(1, 20),
    heads=st.sampled_from(HEADS),
    seed=st.integers(0, 2**32),
)
def test_paged_equals_packed(lengths: list[int], chunk: int, heads: tuple[int, int], seed: int) -> None:
    """Slots in any order, prompts cut anywhere, sequences joined and left out of steps at will: the same numbers come out."""
    T, K, (_, G) = sum(lengths), 4, heads
    layers = {True: qkv(T, T, *heads, K, seed), False: qkv(T, T, *heads, K, seed + 1)}
    sizes = [len(lengths) * chunk + 7, T + 7]  # of the pools: layer 0 is local, layer 1 global
    rng = random.Random(seed)
    ring, full = (iter(rng.sample(range(size), size)) for size in sizes)
    served = [Served(n, chunk, [next(full) for _ in range(n)], [next(ring) for _ in range(chunk)]) for n in lengths]
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    keys, values = ([torch.full((size, G, 1, K), torch.nan) for size in sizes] for _ in range(2))
    while waiting := [i for i, s in enumerate(served) if s.done < s.length]:
        step = rng.sample(waiting, rng.randint(1, len(waiting)))
        runs = [served[i].runs(rng.choice([1, 2, 5, 25])) for i in step]
        rows = torch.tensor([starts[i] + p for i, (new, *_) in zip(step, runs, strict=True) for p in new])
        local, everything = (Reach([run[which] for run in runs], [len(run[which]) for run in runs], page_tokens=1) for which in (1, 2))
        attend = Paged([Slots(*pair) for pair in zip(keys, values, strict=True)], [len(run[0]) for run in runs], local, everything)
        for is_local, (q, k, v) in layers.items():
            out = attend(0 if is_local else 1, is_local, q[rows], k[rows], v[rows])
            for i, part in zip(step, out.split([len(run[0]) for run in runs]), strict=True):
                served[i].outs[is_local].append(part)
    for is_local, (q, k, v) in layers.items():
        out = torch.cat([part for s in served for part in s.outs[is_local]])
        torch.testing.assert_close(out, Packed(lengths, chunk)(0, is_local, q, k, v), atol=2e-6, rtol=1e-6)


def test_paged_keeps_the_dtype_of_the_queries_whatever_the_pages_are() -> None:
    q, k, v = qkv(3, 3, 4, 2, 8)
    slots = Slots(*torch.zeros(2, 9, 2, 1, 8, dtype=torch.bfloat16))
    reach = Reach([[7, 2, 5]], [3], page_tokens=1)
    out = Paged([slots], [3], reach, reach)(0, True, q, k, v)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, causal(q, k.bfloat16().float(), v.bfloat16().float()))
    assert (slots.keys[[0, 1, 3, 4, 6, 8]] == 0).all(), "no slot but the three was written"


def test_int8_pages_are_off_by_half_a_code_at_most() -> None:
    """A code is a 127th of the largest number of a token and head."""
    _, k, v = qkv(5, 5, 4, 2, 16)
    k[1, 0] = 0
    slots, at = Slots.empty((3, 2, 3, 16), dtype=torch.int8, device=torch.device("cpu")), torch.tensor([7, 0, 2, 5, 8])
    slots.write(at, k, v)
    for x, found in zip((k, v), slots.read(at, torch.float32), strict=True):
        assert ((found - x).abs() <= x.abs().amax(-1, keepdim=True) / 127 * 0.5001).all()
    assert Slots.token_bytes(2, 16, torch.int8) == 2 * 2 * (16 + 4)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.sampled_from(HEADS), st.integers(1, 70), st.integers(0, 2**32))
def test_together_equals_by_sequence(lengths: list[int], heads: tuple[int, int], columns: int, seed: int) -> None:
    """One token of each sequence, slots in any order, tables padded to any width; slots that nobody has written hold NaN."""
    B, size, (H, G), K = len(lengths), sum(lengths) + 7, heads, 4
    slots = iter(random.Random(seed).sample(range(size), size))
    read = [[next(slots) for _ in range(length)] for length in lengths]
    reach = Reach(read, lengths, page_tokens=1)
    q, k, v = qkv(B, B, H, G, K, seed)
    filled = torch.tensor([slot for own in read for slot in own])
    outs = []
    for together in (False, True):
        keys, values = (torch.full((size, G, 1, K), torch.nan) for _ in range(2))
        keys[filled, :, 0], values[filled, :, 0] = qkv(0, len(filled), H, G, K, seed + 1)[1:]
        attend: Paged | Together = Paged([Slots(keys, values)], [1] * B, reach, None)
        if together:
            attend = Together([Slots(keys, values)], Table.of(reach, torch.device("cpu"), columns), None)
        outs.append(attend(0, True, q, k, v))
    torch.testing.assert_close(outs[1], outs[0], atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("counts", "lengths", "is_suited"),
    [
        ([1], [9], False),
        ([1, 1], [9, 30], True),
        ([1, 2], [9, 30], False),
        ([1] * 9, [9] * 8 + [1000], True),
        ([1] * 9, [9] * 8 + [3000], False),
    ],
)
def test_together_suits_decoding_without_much_padding(counts: list[int], lengths: list[int], is_suited: bool) -> None:
    reach = Reach([[] for _ in lengths], lengths, page_tokens=1)
    assert Together.suits(Paged([], counts, None, reach)) is is_suited
