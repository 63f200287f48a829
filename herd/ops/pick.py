"""Which implementation of an op runs: one table, from which calls are dispatched and `herd inspect --ops` prints.

For each op the ways are tried from the top; the first that serves the device and dtype, that this machine can run, and that takes the
arguments of the call, runs. The last way of an op takes everything. Ops of a later station (`run` is None) are run there, by `ways`.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from herd.ops.attend import Packed, Paged, Together
from herd.ops.grouped import grouped_linear_mm, grouped_linear_plain
from herd.ops.int4 import blocks_linear_plain, dequantize
from herd.ops.native import kernels
from herd.ops.sample import Draw, mask_plain, sample_plain

OPS = {
    "blocks": "x times 4-bit and 8-bit blocks, of one matrix or of each row's expert",
    "experts": "x times the plain matrix of each row's expert",
    "packed": "attention within whole documents",
    "paged": "attention through pages",
    "step": "all layers of a step",
    "sampling": "from logits to a token",
    "mask": "logits of tokens that a grammar does not allow",
}


def _native() -> tuple[bool, str]:
    found = kernels()
    if found is not None:
        return True, f"built, {found.path} instructions"
    return False, "HERD_NATIVE=off" if os.environ.get("HERD_NATIVE") == "off" else "not built: no C++ compiler at install"


def _gpu(*majors: int) -> tuple[bool, str]:
    """A CUDA device, of one of these major compute capabilities if there are any."""
    if not torch.cuda.is_available():
        return False, "no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    wanted = f"; it wants {' or '.join(f'{m}.x' for m in majors)}" if majors and major not in majors else ""
    return not wanted, f"compute capability {major}.{minor}{wanted}"


def _triton() -> tuple[bool, str]:
    if torch.cuda.is_available() and find_spec("triton") is None:
        return False, "triton is not installed"
    return _gpu(8, 9, 10, 11, 12)


def _blocks_native(x: Tensor, blocks: Tensor, counts: Tensor | None, bits: int) -> Tensor:
    native = kernels()
    assert native is not None
    return native.product(x.float(), blocks, counts, bits=bits).type_as(x)


def _blocks_triton(x: Tensor, blocks: Tensor, counts: Tensor | None, bits: int) -> Tensor:
    del bits
    from herd.ops.blocks_triton import product  # only where it runs: importing triton takes a second, and CPUs need not have it

    return product(x, blocks, counts)


def _blocks_plain(x: Tensor, blocks: Tensor, counts: Tensor | None, bits: int) -> Tensor:
    return _each(partial(blocks_linear_plain, bits=bits), x, blocks, counts)


def _blocks_dequantized(x: Tensor, blocks: Tensor, counts: Tensor | None, bits: int) -> Tensor:
    del bits
    return _each(lambda part, w: part @ dequantize(w, part.dtype).T, x, blocks, counts)


def _each(product: Callable[[Tensor, Tensor], Tensor], x: Tensor, blocks: Tensor, counts: Tensor | None) -> Tensor:
    if counts is None:
        return product(x, blocks).type_as(x)
    parts = torch.split(x, counts.tolist())
    return torch.cat([product(part, w) for part, w in zip(parts, blocks, strict=True)]).type_as(x)


def _sample_native(logits: Tensor, draw: Draw) -> int:
    native = kernels()
    assert native is not None
    return native.sample(logits, draw)


def _mask_native(logits: Tensor, bits: Tensor) -> None:
    native = kernels()
    assert native is not None
    native.mask(logits, bits)


def _whole_vectors(x: Tensor, weight: Tensor, counts: Tensor) -> bool:
    del x, counts
    return not any(size * weight.element_size() % 16 for size in weight.shape[1:])


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One implementation of an op, and what it serves."""

    op: str
    name: str
    home: str  # its file
    run: Callable[..., Any] | None = None
    devices: tuple[str, ...] = ()  # types of device; none: any
    dtypes: tuple[torch.dtype, ...] = ()  # of the activations; none: any
    needs: Callable[[], tuple[bool, str]] | None = None  # whether this machine has what it takes, and that in words
    takes: Callable[..., bool] | None = None  # whether it takes the arguments of a call; None: all
    only: str = ""  # `takes` in words; of an op of a later station, what that looks at
    is_plain: bool = False  # the definition, which the others are held equal to
    waits: bool = False  # whether the host waits for the device, so that a CUDA graph cannot record it

    def serves(self, device: str, dtype: torch.dtype) -> bool:
        return (not self.devices or device in self.devices) and (not self.dtypes or dtype in self.dtypes)


_HALVES = (torch.bfloat16, torch.float16)
_FLOATS = (torch.float32, *_HALVES)

TABLE = (
    Way(op="blocks", name="native", home="herd/ops/native/", run=_blocks_native, devices=("cpu",), needs=_native),
    Way(op="blocks", name="plain", home="herd/ops/int4.py", run=_blocks_plain, devices=("cpu",), is_plain=True),
    Way(
        op="blocks",
        name="triton",
        home="herd/ops/blocks_triton.py",
        run=_blocks_triton,
        devices=("cuda",),
        dtypes=_FLOATS,
        needs=_triton,
    ),
    Way(op="blocks", name="dequantized", home="herd/ops/pick.py", run=_blocks_dequantized, is_plain=True, waits=True),
    Way(
        op="experts",
        name="grouped_mm",
        home="herd/ops/grouped.py",
        run=grouped_linear_mm,
        devices=("cuda",),
        dtypes=(torch.bfloat16,),
        needs=lambda: _gpu(9, 10),  # elsewhere torch fetches the counts and loops. Source: ATen's GroupedBlas.cpp
        takes=_whole_vectors,
        only="matrix rows of whole 16 bytes",
    ),
    Way(
        op="experts",
        name="grouped_mm",
        home="herd/ops/grouped.py",
        run=grouped_linear_mm,
        devices=("cpu",),
        dtypes=_FLOATS,
        takes=_whole_vectors,
        only="matrix rows of whole 16 bytes",
    ),
    Way(op="experts", name="loop", home="herd/ops/grouped.py", run=grouped_linear_plain, is_plain=True, waits=True),
    Way(op="packed", name="by run", home="herd/ops/attend.py", run=Packed, is_plain=True),
    Way(
        op="paged",
        name="together",
        home="herd/ops/attend.py",
        run=Together.of,
        devices=("cuda",),
        takes=Together.suits,
        only="sequences that all decode, of like lengths",
    ),
    Way(op="paged", name="by sequence", home="herd/ops/attend.py", run=lambda paged: paged, is_plain=True),
    Way(
        op="step",
        name="native",
        home="herd/engine/whole.py",
        devices=("cpu",),
        dtypes=(torch.float32,),
        needs=_native,
        only="models whose matrices are blocks",
    ),
    Way(
        op="step",
        name="graphs",
        home="herd/engine/graphs.py",
        devices=("cuda",),
        needs=_gpu,
        only="decoding, by ways that never wait for the device",
    ),
    Way(op="step", name="layer by layer", home="herd/model/llama4.py", is_plain=True),
    Way(
        op="sampling", name="native", home="herd/ops/native/", run=_sample_native, devices=("cpu",), dtypes=(torch.float32,), needs=_native
    ),
    Way(op="sampling", name="torch", home="herd/ops/sample.py", run=sample_plain, is_plain=True),
    Way(op="mask", name="native", home="herd/ops/native/", run=_mask_native, devices=("cpu",), dtypes=(torch.float32,), needs=_native),
    Way(op="mask", name="torch", home="herd/ops/sample.py", run=mask_plain, is_plain=True),
)


@cache
def ways(op: str, device: str, dtype: torch.dtype) -> tuple[Way, ...]:
    """What this machine can run of an op on a type of device, in the order in which it is tried."""
    return tuple(way for way in TABLE if way.op == op and way.serves(device, dtype) and (way.needs is None or way.needs()[0]))


def choose(op: str, device: str, dtype: torch.dtype, *args: Any) -> Way:
    """The way that a call takes. args: of the call."""
    return next(way for way in ways(op, device, dtype) if way.takes is None or way.takes(*args))


def holds_blocks(device: str, dtype: torch.dtype) -> bool:
    """Whether blocks are best left as they are on such a device: something better than the definition multiplies by them."""
    return not ways("blocks", device, dtype)[0].is_plain


def _call(op: str, x: Tensor, *args: Any) -> Any:
    run = choose(op, x.device.type, x.dtype, *args).run
    assert run is not None
    return run(*args)


def blocks_linear(x: Tensor, blocks: Tensor, counts: Tensor | None = None, *, bits: int = 16) -> Tensor:
    """x [T, K] times blocks [N/8, K/g, B] -> [T, N]; with counts [E], x sorted by expert times [E, N/8, K/g, B].

    bits: on a CPU activations are rounded to so many on the way, 8 or 16; elsewhere nothing is rounded.
    """
    y: Tensor = _call("blocks", x, x, blocks, counts, bits)
    return y


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """x [R, D] sorted by expert, weight [E, F, D], counts [E] rows of each expert -> [R, F]."""
    y: Tensor = _call("experts", x, x, weight, counts)
    return y


def paged(attend: Paged) -> Paged | Together:
    """`attend` as it is best computed where its pages are."""
    best: Paged | Together = _call("paged", attend.slots[0].keys, attend)
    return best


def sample(logits: Tensor, draw: Draw) -> int:
    """logits [V] float32 -> a token, the same in every way."""
    token: int = _call("sampling", logits, logits, draw)
    return token


def mask(logits: Tensor, bits: Tensor) -> None:
    """Set the logits [V] float32 of tokens whose bit is 0 to -inf, in place. bits: [V/32] int32, on the CPU, the lowest first."""
    _call("mask", logits, logits, bits)
