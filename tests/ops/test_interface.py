"""The C interface with what no caller should give it: an error code, never a crash."""

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch

from herd.ops.native import Kernels, kernels, tables

OK, BAD_SHAPE = 0, 1
HUGE = 1 << 62
FLOATS = torch.zeros(1 << 16)
BYTES = torch.zeros(1 << 16, dtype=torch.uint8)
COUNTS = torch.ones(64, dtype=torch.int64)


@pytest.fixture
def library() -> Any:
    loaded: Kernels | None = kernels()
    if loaded is None:
        pytest.skip("the native kernels are not built here")
    return loaded._library


def changed(call: Callable[..., int], given: dict[str, Any], **changes: Any) -> int:
    return call(*(given | changes).values())


def test_a_path_without_a_name(library: Any) -> None:
    assert library.herd_use_path(None) != OK
    assert library.herd_use_path(b"") != OK
    for count in (0, -1, 1025, -(1 << 31)):
        assert library.herd_use_threads(count) == BAD_SHAPE


@pytest.mark.parametrize(
    "changes",
    [
        {"x": None},
        {"codes": None},
        {"scales": None},
        {"tokens": -1},
        {"tokens": HUGE},
        {"tokens": -HUGE},
        {"columns": 0},
        {"columns": -32},
        {"columns": 31},
        {"columns": HUGE},
        {"parts": 0},
        {"parts": 3},
        {"tokens": 1 << 32, "columns": 1 << 32},
    ],
    ids=str,
)
def test_round(library: Any, changes: dict[str, Any]) -> None:
    codes, scales = torch.zeros(64, dtype=torch.int16), torch.zeros(2)
    given = {"x": FLOATS.data_ptr(), "tokens": 2, "columns": 32, "parts": 2, "codes": codes.data_ptr(), "scales": scales.data_ptr()}
    assert changed(library.herd_round, given) == OK
    assert changed(library.herd_round, given, x=None, tokens=0, codes=None, scales=None) == OK
    assert changed(library.herd_round, given, **changes) == BAD_SHAPE


@pytest.mark.parametrize(
    "changes",
    [
        {"data": None},
        {"x": None},
        {"y": None},
        {"counts": None},
        {"counts": torch.tensor([2, -1])},
        {"counts": torch.tensor([-(1 << 63), 5])},
        {"counts": torch.tensor([HUGE, HUGE])},
        {"counts": torch.tensor([(1 << 63) - 1, 1])},
        {"num": 0},
        {"num": -1},
        {"num": HUGE},
        {"rows": 12},
        {"rows": 0},
        {"rows": -8},
        {"rows": HUGE},
        {"columns": 33},
        {"columns": 0},
        {"columns": -32},
        {"columns": HUGE},
        {"rows": 1 << 32, "columns": 1 << 32},
        {"group": 0},
        {"group": 31},
        {"group": -32},
        {"bits": 0},
        {"bits": 5},
        {"parts": 0},
        {"parts": 3},
        {"bits": 8, "has_minimum": 1},
        {"bits": 8, "group": 128},
    ],
    ids=str,
)
def test_product(library: Any, changes: dict[str, Any]) -> None:
    y = torch.zeros(4, 8)
    given: dict[str, Any] = {
        "data": BYTES.data_ptr(),
        "num": 2,
        "rows": 8,
        "columns": 128,
        "group": 32,
        "bits": 4,
        "has_minimum": 0,
        "parts": 2,
    }
    given |= {"x": FLOATS.data_ptr(), "counts": COUNTS.data_ptr(), "y": y.data_ptr()}
    assert changed(library.herd_product, given) == OK
    none = torch.zeros(2, dtype=torch.int64)
    assert changed(library.herd_product, given, counts=none.data_ptr(), x=None, y=None) == OK
    kept = {name: value.data_ptr() if isinstance(value, torch.Tensor) else value for name, value in changes.items()}
    assert changed(library.herd_product, given, **kept) == BAD_SHAPE


@pytest.mark.parametrize(
    "changes",
    [
        {"logits": None},
        {"token": None},
        {"draw": None},
        {"count": 0},
        {"count": -1},
        {"count": HUGE},
        {"count": (1 << 21) + 1},
        {"scale": 0.0},
        {"scale": -1.0},
        {"scale": float("nan")},
        {"top_p": -0.1},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"point": 1.0},
        {"point": -0.1},
        {"point": float("nan")},
        {"top_k": -1},
        {"least": -1},
        {"least": HUGE},
    ],
    ids=str,
)
def test_sample(library: Any, changes: dict[str, Any]) -> None:
    fields: dict[str, Any] = {"scale": 1.0, "top_p": 0.9, "point": 0.5, "top_k": 0, "least": 0}
    good = tables.Draw(**fields)
    bad = tables.Draw(**{name: changes.get(name, value) for name, value in fields.items()})
    token = ctypes.c_int64(-1)
    given = {"logits": FLOATS.data_ptr(), "count": 100, "draw": ctypes.byref(good), "token": ctypes.byref(token)}
    assert changed(library.herd_sample, given) == OK and 0 <= token.value < 100
    for top_k in (1, 99, 100, 101, HUGE):
        many = tables.Draw(**(fields | {"top_k": top_k}))
        assert changed(library.herd_sample, given, draw=ctypes.byref(many)) == OK
    given = given | {"draw": ctypes.byref(bad)} | {name: value for name, value in changes.items() if name in given}
    assert changed(library.herd_sample, given) == BAD_SHAPE


@pytest.mark.parametrize("changes", [{"logits": None}, {"bits": None}, {"count": 0}, {"count": -1}], ids=str)
def test_mask(library: Any, changes: dict[str, Any]) -> None:
    logits, bits = torch.zeros(100), torch.zeros(4, dtype=torch.int32)
    given = {"logits": logits.data_ptr(), "count": 100, "bits": bits.data_ptr()}
    assert changed(library.herd_mask, given) == OK and bool(logits.isinf().all())
    assert changed(library.herd_mask, given, **changes) == BAD_SHAPE


def matrix(rows: int, columns: int, **changes: Any) -> tables.Matrix:
    fields = {"data": BYTES.data_ptr(), "rows": rows, "columns": columns, "group": 32, "bits": 4, "has_minimum": 0, "reserved": 0}
    return tables.Matrix(**(fields | changes))


_STAYING: list[torch.Tensor] = []


def address(*values: int) -> int:
    """Of numbers that stay."""
    _STAYING.append(torch.tensor(values))
    return _STAYING[-1].data_ptr()


REACH = tables.Reach(address(0, 1, 2), address(3), address(3), 1)


def step_of(layer: dict[str, Any], model: dict[str, Any], step: dict[str, Any]) -> tuple[Any, ...]:
    """Tables of a model of one layer, two experts and one sequence of three tokens, with some fields changed."""
    weights = {"q": (64, 32), "k": (32, 32), "v": (32, 32), "o": (32, 64), "gate": (32, 32), "up": (32, 32), "down": (32, 32)}
    fields: dict[str, Any] = {name: matrix(*shape) for name, shape in weights.items()}
    fields |= {f"experts_{name}": matrix(*weights[name]) for name in ("gate", "up", "down")}
    fields |= dict.fromkeys(("attention_norm", "ffn_norm", "router"), FLOATS.data_ptr())
    kept = torch.zeros(2, 1024)
    pages = {"keys": kept[0].data_ptr(), "values": kept[1].data_ptr(), "kv_heads": 2, "page_tokens": 1, "kind": 0}
    pages |= {name: value for name, value in layer.items() if name in ("keys", "values", "kv_heads", "page_tokens", "kind")}
    layer = {name: value for name, value in layer.items() if name not in pages}
    layers = (tables.Layer * 1)(tables.Layer(**(fields | {"pages": tables.Pages(**pages)} | layer)))
    sizes = {"width": 32, "heads": 4, "kv_heads": 2, "head_width": 16, "experts": 2, "experts_per_token": 1, "num_layers": 1}
    facts = {"norm_eps": 1e-5, "qk_norm_eps": 0.0, "activation_parts": 2, "frequencies": address(0, 0, 0, 0, 0, 0, 0, 0)}
    facts |= {"temperature_floor": 8, "layers": layers, "norm": FLOATS.data_ptr(), "embed": matrix(64, 32), "head": matrix(64, 32)}
    whole = tables.Model(**(sizes | facts | model))
    x, logits = torch.zeros(3, 32), torch.zeros(3, 64)
    given = {"tokens": 3, "sequences": 1, "counts": address(3), "starts": address(0), "full": REACH, "x": x.data_ptr()}
    given |= {"ids": address(0, 1, 63), "num_rows": 1, "rows": address(2), "logits": logits.data_ptr()}
    return whole, tables.Step(**(given | step)), (layers, kept, x, logits)


@pytest.mark.parametrize(
    ("layer", "model", "step"),
    [
        *(({name: None}, {}, {}) for name in ("attention_norm", "ffn_norm", "keys", "values")),
        *(({name: matrix(32, 32, data=None)}, {}, {}) for name in ("q", "o", "gate", "experts_up")),
        *(({name: matrix(12, 32)}, {}, {}) for name in ("q", "k", "down", "experts_gate")),
        *(({name: matrix(128, 32)}, {}, {}) for name in ("q", "k", "v", "o", "gate", "up", "down", "experts_up", "experts_down")),
        *(({name: matrix(32, 128)}, {}, {}) for name in ("q", "o", "gate", "up", "down", "experts_gate", "experts_down")),
        *(({"gate": matrix(HUGE, 32), "up": matrix(HUGE, 32), "down": matrix(32, HUGE)}, {}, {}),),
        ({"is_local": 1}, {}, {}),
        *(({"kv_heads": n}, {}, {}) for n in (0, 3, HUGE)),
        *(({"page_tokens": n}, {}, {}) for n in (0, -1, 2, HUGE)),
        *(({"kind": n}, {}, {}) for n in (-1, 4)),
        ({"kind": 2}, {}, {}),  # int8 without scales
        *(({}, {"width": n}, {}) for n in (0, -32, 31, 64, HUGE)),
        *(({}, {"heads": n}, {}) for n in (0, -4, 3, HUGE)),
        *(({}, {"kv_heads": n}, {}) for n in (0, -2, 3, HUGE)),
        *(({}, {"head_width": n}, {}) for n in (0, -16, 8, 17, HUGE)),
        *(({}, {"activation_parts": n}, {}) for n in (0, 3)),
        *(({}, {name: None}, {}) for name in ("frequencies", "norm")),
        *(({}, {name: matrix(64, 64)}, {}) for name in ("embed", "head")),
        *(({}, {"experts": n}, {}) for n in (0, -1, HUGE)),
        *(({}, {"experts_per_token": n}, {}) for n in (0, -1, 3, HUGE)),
        ({}, {"num_layers": -1}, {}),
        ({}, {"layers": None}, {}),
        *(({}, {}, {"tokens": n}) for n in (0, -1, 2, 4, HUGE)),
        *(({}, {}, {"sequences": n}) for n in (0, -1)),
        *(({}, {}, {name: None}) for name in ("counts", "starts", "rows", "x")),
        *(({}, {}, {"ids": address(0, n, 1)}) for n in (-1, 64, HUGE)),
        *(({}, {}, {"rows": address(n)}) for n in (-1, 3, HUGE)),
        *(({}, {}, {"num_rows": n}) for n in (-1, 4)),
        ({}, {}, {"starts": address(-1)}),
        *(({}, {}, {"counts": address(n)}) for n in (-1, 2, 4, HUGE)),
        ({}, {}, {"sequences": 2, "counts": address((1 << 63) - 1, 4)}),
        ({}, {}, {"full": tables.Reach()}),
        ({}, {}, {"full": tables.Reach(address(0, 1, 2), address(3), address(2), 1)}),
        ({}, {}, {"full": tables.Reach(address(0, 1, 2), address(3), address(4), 1)}),
        ({}, {}, {"full": tables.Reach(address(0, 1, 2), address(3), address(3), 0)}),
    ],
)
def test_step(library: Any, layer: dict[str, Any], model: dict[str, Any], step: dict[str, Any]) -> None:
    whole, good, kept = step_of({}, {}, {})
    assert library.herd_step(ctypes.byref(whole), ctypes.byref(good)) == OK
    assert library.herd_step(None, ctypes.byref(good)) == library.herd_step(ctypes.byref(whole), None) == BAD_SHAPE
    whole, bad, kept = step_of(layer, model, step)
    assert library.herd_step(ctypes.byref(whole), ctypes.byref(bad)) == BAD_SHAPE
    del kept
