"""The native kernels against the plain definitions, on every instruction set that this machine has."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import herd.ops.native as native_package
from herd.errors import UsageError
from herd.ops.int4 import Kind, blocks_linear_plain, dequantize, pack_int4, pack_int8, round_activations
from herd.ops.native import Kernels, kernels

KINDS = [Kind(4, 32), Kind(4, 32, True), Kind(4, 128), Kind(4, 128, True), Kind(8, 32)]


@pytest.fixture
def native() -> Iterator[Kernels]:
    loaded = kernels()
    if loaded is None:
        pytest.skip("the native kernels are not built here")
    before = loaded.path
    yield loaded
    loaded.use_path(before)
    loaded.use_threads(1)


def paths(native: Kernels) -> Iterator[str]:
    """Every instruction set of this machine, chosen in turn."""
    for path in ("portable", "avx2", "avxvnni", "vnni"):
        try:
            native.use_path(path)
        except UsageError:
            continue
        yield path


def random_blocks(kind: Kind, *shape: int, seed: int = 0) -> torch.Tensor:
    """Blocks of random codes, scales and minimums for a matrix [.., N, K]."""
    generator = torch.Generator().manual_seed(seed)
    groups = (*shape[:-1], shape[-1] // kind.group)
    scale = (torch.rand(groups, generator=generator) * 0.1).half()
    if kind.bits == 8:
        return pack_int8(torch.randint(-127, 128, shape, generator=generator).to(torch.int8), scale)
    minimum = (-torch.rand(groups, generator=generator)).half() if kind.has_minimum else None
    return pack_int4(torch.randint(0, 16, shape, generator=generator).to(torch.uint8), scale, minimum)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("shape", [(8, 128), (24, 256), (88, 384), (576, 1536)], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_products_equal_the_definition(native: Kernels, kind: Kind, shape: tuple[int, int], bits: int) -> None:
    """Odd numbers of blocks, 1 to 64 tokens: within float32's rounding of the sum, and the same bits on every path and thread count."""
    blocks = random_blocks(kind, *shape)
    for tokens in (1, 2, 3, 5, 6, 7, 12, 13, 64):
        x = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(tokens)) * 3
        want = blocks_linear_plain(x, blocks, bits)
        found = []
        for _ in paths(native):
            for threads in (1, 2, 3):
                native.use_threads(threads)
                found.append(native.product(x, blocks, bits=bits))
        torch.testing.assert_close(found[0], want, rtol=1e-5, atol=2e-5 * float(want.abs().max()))
        assert all(torch.equal(other, found[0]) for other in found)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_row_does_not_depend_on_its_batch(native: Kernels, kind: Kind, bits: int) -> None:
    blocks = random_blocks(kind, 104, 256)
    x = torch.randn(40, 256)
    for _ in paths(native):
        whole = native.product(x, blocks, bits=bits)
        for start, count in ((0, 1), (3, 1), (17, 2), (5, 3), (5, 4), (20, 7), (39, 1), (5, 13)):
            assert torch.equal(native.product(x[start : start + count], blocks, bits=bits), whole[start : start + count])


@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 0, 9], [0, 0, 0, 0], [64, 1, 0, 2]], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_experts_equal_one_product_each(native: Kernels, kind: Kind, counts: list[int]) -> None:
    blocks = random_blocks(kind, 4, 40, 256)
    x = torch.randn(sum(counts), 256)
    for _ in paths(native):
        found = native.product(x, blocks, torch.tensor(counts))
        parts = [native.product(part, blocks[e]) for e, part in enumerate(torch.split(x, counts)) if len(part)]
        assert torch.equal(found, torch.cat(parts) if parts else torch.empty(0, 40))


def test_rounding_equals_the_definition(native: Kernels) -> None:
    x = torch.randn(7, 256) * torch.logspace(-45, 30, 7)[:, None]
    x[0, :32] = 0
    x[1, 32:64] = 1e-45
    x[2, 0] = 32384.0
    x[2, 1:32] = torch.arange(31) * 1000 + 0.5  # halves go to even
    for bits in (8, 16):
        want = round_activations(x, bits)
        for _ in paths(native):
            assert all(torch.equal(a, b) for a, b in zip(native.round(x, bits), want, strict=True))


@pytest.mark.parametrize("bits", [8, 16])
def test_the_error_is_that_of_rounding_the_activations(native: Kernels, bits: int) -> None:
    """Against the product of the numbers themselves: at most half a code of every activation times its weight."""
    blocks = random_blocks(Kind(4, 32, True), 64, 512)
    x = torch.randn(9, 512)
    weight = dequantize(blocks, torch.float64)
    half_code = round_activations(x, bits)[1].double().repeat_interleave(32, -1) / 2
    bound = half_code @ weight.abs().T
    error = (native.product(x, blocks, bits=bits).double() - x.double() @ weight.T).abs()
    assert (error <= bound * 1.001 + 1e-4).all()
    assert error.max() > 0.05 * bound.min(), "the bound says something"


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_does_not_become_one(native: Kernels, wrong: float, bits: int) -> None:
    """One NaN or infinity makes its row NaN on every path, as in the definition, and no other row."""
    blocks = random_blocks(Kind(4, 32, True), 24, 128)
    x = torch.randn(5, 128)
    want = native.product(x, blocks, bits=bits)
    x[2, 70] = wrong
    assert blocks_linear_plain(x, blocks, bits)[2].isnan().all()
    for _ in paths(native):
        found = native.product(x, blocks, bits=bits)
        assert found[2].isnan().all()
        assert torch.equal(found[[0, 1, 3, 4]], want[[0, 1, 3, 4]])


def test_many_threads_may_call_at_once(native: Kernels) -> None:
    from concurrent.futures import ThreadPoolExecutor

    blocks = random_blocks(Kind(4, 32), 256, 512)
    inputs = [torch.randn(1 + i % 9, 512) for i in range(40)]
    native.use_threads(2)
    want = [native.product(x, blocks) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda x: native.product(x, blocks), inputs * 5))
    assert all(torch.equal(a, b) for a, b in zip(found, want * 5, strict=True))


def test_threads_that_call_take_turns(native: Kernels) -> None:
    """Who has had his product comes after those who wait; a plain mutex gives it to the same again 3 times of 5 and more."""
    blocks, x = random_blocks(Kind(8, 32), 1024, 1024), torch.randn(16, 1024)
    native.use_threads(1)
    turns: list[int] = []

    def call(me: int) -> None:
        end = time.perf_counter() + 0.4
        while time.perf_counter() < end:
            native.product(x, blocks)
            turns.append(me)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    among = turns[len(turns) // 4 : -len(turns) // 4]  # all four have begun, and none has ended
    assert sum(a == b for a, b in pairwise(among)) < 0.4 * len(among)


def test_the_first_that_lives_decides_how_many_threads_there_are(native: Kernels) -> None:
    class Sharer:
        pass

    loaded = Kernels(next(Path(native_package.__file__).parent.glob("_kernels*.so")))  # with sharers of its own, over the same pool
    loaded.use_threads(3)
    first, second = Sharer(), Sharer()
    assert loaded.share(first, 2) == 2 and loaded.share(second) == 2
    with pytest.raises(UsageError, match="threads is 1; the engines of a process share one pool, and 2 run on its 2 threads"):
        loaded.share(Sharer(), 1)
    del first, second
    assert loaded.share(Sharer()) == 3  # what the process chose, not what a dead one had asked for
    assert loaded.share(Sharer(), 1) == 1


def test_a_path_that_is_not_there_is_refused(native: Kernels) -> None:
    with pytest.raises(UsageError, match="neon"):
        native.use_path("neon")
    with pytest.raises(UsageError, match="0"):
        native.use_threads(0)


SWITCHED = """
import sys, torch
from herd.errors import HerdError
from herd.ops.native import kernels
from herd.ops.pick import blocks_linear
from tests.ops.test_native import KINDS, random_blocks
try:
    native = kernels()
except HerdError as error:
    sys.exit(error.message)
x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0))
torch.save([blocks_linear(x, random_blocks(kind, 24, 256)) for kind in KINDS], sys.argv[1])
print(native and native.path)
"""


@pytest.mark.parametrize("wish", ["off", "portable", "avx2", "neon"])
def test_the_environment_chooses_the_path(native: Kernels, wish: str, tmp_path: Path) -> None:
    """As on a machine without AVX2, or without the kernels: the same numbers by the portable or the plain road."""
    if wish == "avx2" and "avx2" not in paths(native):
        pytest.skip("this machine has no AVX2")
    environment = os.environ | {"HERD_NATIVE": wish, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SWITCHED, str(tmp_path / "found.pt")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2], timeout=120)
    if wish == "neon":
        assert done.returncode == 1 and "'neon'" in done.stderr and "Traceback" not in done.stderr
        return
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ("None" if wish == "off" else wish)
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0))
    for found, kind in zip(torch.load(tmp_path / "found.pt"), KINDS, strict=True):
        want = native.product(x, random_blocks(kind, 24, 256))
        if wish == "off":
            torch.testing.assert_close(found, want, rtol=1e-5, atol=2e-5 * float(want.abs().max()))
        else:
            assert torch.equal(found, want)
