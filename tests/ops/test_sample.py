"""From logits to a token: the native road against the definition, the definition against softmax, and what it costs."""

import time
from collections.abc import Iterator
from itertools import product

import pytest
import torch

from herd.errors import HerdError, UsageError
from herd.ops.native import Kernels, kernels
from herd.ops.sample import WEIGHT_BITS, Draw, kept, mask_plain, sample_plain

LIMITS: list[dict[str, float]] = [
    {},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 1000},
    {"top_p": 0.0},
    {"top_p": 0.5},
    {"top_p": 0.9},
    {"top_p": 0.999999},
    {"min_p": 0.05},
    {"min_p": 1e-9},
    {"min_p": 1e-13},
    {"min_p": 4e-13},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.9},
    {"top_p": 0.9, "min_p": 0.05},
    {"top_p": 0.7, "min_p": 1e-12},
    {"top_k": 20, "top_p": 0.95, "min_p": 0.02},
]
TEMPERATURES = (0.0, 1e-320, 1e-6, 0.2, 0.6, 1.0, 2.0)
POINTS = (0.0, 1e-12, 0.3, 0.77, 0.95, 1 - 2**-53)


@pytest.fixture
def native() -> Iterator[Kernels]:
    loaded = kernels()
    if loaded is None:
        pytest.skip("the native kernels are not built here")
    before = loaded.path
    yield loaded
    loaded.use_path(before)


def found(native: Kernels, logits: torch.Tensor, draw: Draw) -> set[int]:
    """What every instruction set of this machine draws."""
    tokens = set()
    for path in ("portable", "avx2", "avxvnni", "vnni"):
        try:
            native.use_path(path)
        except UsageError:
            continue
        tokens.add(native.sample(logits, draw))
    return tokens


def shapes(num: int) -> dict[str, torch.Tensor]:
    """Logits [num] of every kind."""
    generator = torch.Generator().manual_seed(num)
    normal = torch.randn(num, generator=generator)
    peaked = normal * 2.5
    peaked[num // 2 :][:40] += torch.linspace(20, 8, 40)[: num - num // 2]
    masked = normal * 3
    masked[torch.rand(num, generator=generator) < 0.9] = -torch.inf
    masked[num // 3] = 1.0
    return {
        "normal": normal,
        "wide": normal * 4,
        "peaked": peaked,
        "equal": torch.full((num,), -3.25),
        "ties": (normal * 2).round(),
        "signed zeros": torch.where(normal > 0, 0.0, -0.0),
        "bfloat16": peaked.bfloat16().float(),
        "masked": masked,
        "one left": torch.where(torch.arange(num) == num - 1, 0.0, -torch.inf),
        "huge": normal * 5e37,
        "tiny": normal * 1e-42,
    }


@pytest.mark.parametrize("num", [1, 2, 7, 64, 65, 1000, 49152])
def test_native_equals_the_definition(native: Kernels, num: int) -> None:
    points = POINTS if num < 10_000 else POINTS[2:4]
    for (name, logits), limits, temperature in product(shapes(num).items(), LIMITS, TEMPERATURES if num < 10_000 else (0.0, 0.7)):
        for point in points:
            draw = Draw(temperature=temperature, point=point, **limits)  # type: ignore[arg-type]
            assert found(native, logits, draw) == {sample_plain(logits, draw)}, (name, draw)


@pytest.mark.slow
@pytest.mark.parametrize("name", shapes(1))
def test_native_equals_the_definition_over_the_whole_vocabulary(native: Kernels, name: str) -> None:
    logits = shapes(202_048)[name]
    for limits, temperature, point in product(LIMITS, (0.0, 0.6, 1.0), (0.3, 0.95)):
        draw = Draw(temperature=temperature, point=point, **limits)  # type: ignore[arg-type]
        assert found(native, logits, draw) == {sample_plain(logits, draw)}, draw


@pytest.mark.parametrize("limits", [{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 7, "top_p": 0.9, "min_p": 0.05}], ids=str)
def test_frequencies(native: Kernels, limits: dict[str, float]) -> None:
    """Twenty thousand draws: each token within five standard deviations of its probability, and never one that is not kept."""
    logits = torch.randn(12, generator=torch.Generator().manual_seed(3)) * 1.5
    weights, ids = kept(logits, Draw(temperature=0.8, point=0.0, **limits))  # type: ignore[arg-type]
    want = torch.zeros(12, dtype=torch.float64).index_add(0, ids, weights.double() / weights.sum())
    points = torch.rand(20_000, generator=torch.Generator().manual_seed(4), dtype=torch.float64).tolist()
    tokens = torch.tensor([native.sample(logits, Draw(temperature=0.8, point=point, **limits)) for point in points])  # type: ignore[arg-type]
    share = tokens.bincount(minlength=12) / len(points)
    assert ((share - want).abs() <= 5 * (want * (1 - want) / len(points)).sqrt()).all()


def test_without_limits_weights_are_softmax() -> None:
    logits = torch.randn(1000) * 3
    for temperature in (0.3, 1.0, 2.0):
        weights, _ = kept(logits, Draw(temperature=temperature, point=0.0))
        want = (logits.double() / temperature).softmax(0)
        torch.testing.assert_close(weights.double() / weights.sum(), want, rtol=0, atol=len(logits) * 2.0 ** -(WEIGHT_BITS + 1))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("logits", [[float("nan"), 1.0], [-float("nan"), 1.0], [float("inf"), 1.0], [-float("inf")] * 3], ids=str)
def test_nothing_is_drawn_from_what_is_no_number(native: Kernels, logits: list[float], temperature: float) -> None:
    for draw in (sample_plain, lambda *given: found(native, *given)):
        with pytest.raises(HerdError, match="logits"):
            draw(torch.tensor(logits), Draw(temperature=temperature, point=0.5))
        if set(logits) != {-float("inf")}:
            with pytest.raises(HerdError, match="logits"):
                draw(torch.tensor([0.0] * 200 + logits), Draw(temperature=temperature, point=0.5))


@pytest.mark.slow
@pytest.mark.parametrize("limits", [{"temperature": 0.0}, {}, {"top_p": 0.9}, {"top_k": 40}, {"min_p": 0.05}], ids=str)
def test_a_draw_is_cheap(native: Kernels, limits: dict[str, float]) -> None:
    """Processor time, the best of many, with room for a slow and busy machine; `bench/sample.py` has the numbers."""
    if native.path == "portable":
        pytest.skip("without vectors it is not fast")
    logits = shapes(202_048)["peaked"]
    draw = Draw(**{"temperature": 0.8, "point": 0.5, **limits})  # type: ignore[arg-type]
    best = float("inf")
    for _ in range(50):
        start = time.process_time()
        native.sample(logits, draw)
        best = min(best, time.process_time() - start)
    assert best < 1.5e-3


@pytest.mark.parametrize("count", [1, 31, 32, 33, 64, 1000, 49_152])
def test_a_mask_is_its_bits(count: int) -> None:
    """Native and plain, held to the bits one by one; what lies behind the last token is not touched."""
    generator = torch.Generator().manual_seed(count)
    words = -(-count // 32)
    kinds = torch.randint(0, 3, (words,), generator=generator)
    bits = torch.randint(-(1 << 31), (1 << 31) - 1, (words,), dtype=torch.int64, generator=generator).to(torch.int32)
    bits = torch.where(kinds == 0, 0, torch.where(kinds == 1, -1, bits)).to(torch.int32)
    logits = torch.randn(count + 1, generator=generator)
    want = [x if bits[i // 32].item() >> (i % 32) & 1 else float("-inf") for i, x in enumerate(logits[:count].tolist())]
    native = kernels()
    for run in [mask_plain] + ([native.mask] if native else []):
        found = logits.clone()
        run(found[:count], bits)
        assert found.tolist() == [*want, logits[count].item()]
