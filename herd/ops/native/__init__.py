"""The native kernels, if they were built: plain buffers through ctypes, one pool of threads for the process.

They are built when herd is installed and a C++ compiler is there (`native.cpp`); without them herd says so once and runs the plain torch
definitions in `herd/ops/int4.py` and `herd/ops/sample.py`, which these are held equal to. The instruction set is chosen when the library is
loaded; a result does not depend on it, nor on the number of threads, nor on what else is computed in the same call.

HERD_NATIVE: "off", or a path to hold it to: "portable", "avx2", "avxvnni", "vnni".
HERD_NATIVE_LIBRARY: a file to load in place of the one that was installed, as `make sanitize` does.
"""

import ctypes
import os
import threading
import time
from functools import cache
from pathlib import Path
from weakref import WeakSet

import torch
from torch import Tensor

from herd.errors import ResourceError, UsageError
from herd.log import log
from herd.ops.int4 import kind_of
from herd.ops.native import tables
from herd.ops.sample import Draw, not_numbers

_PATHS = ("portable", "avx2", "avxvnni", "vnni")
_NOT_NUMBERS = 4
_FAULTS = {1: "shapes that do not fit together", 2: "no memory", 3: "this machine has not the instructions"}


class Kernels:
    """The loaded library."""

    def __init__(self, file: Path) -> None:
        self._library = ctypes.CDLL(str(file))  # its functions let other Python threads run
        pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        self._library.herd_path.restype = ctypes.c_char_p
        self._library.herd_use_path.argtypes = [ctypes.c_char_p]
        self._library.herd_use_threads.argtypes = [number]
        self._library.herd_round.argtypes = [pointer, size, size, number, pointer, pointer]
        self._library.herd_product.argtypes = [pointer, size, size, size, number, number, number, number, pointer, pointer, pointer]
        self._library.herd_read.argtypes = [pointer, size]
        self._library.herd_peak.restype = ctypes.c_double
        self._library.herd_sample.argtypes = [pointer, size, pointer, pointer]
        self._sharing: WeakSet[object] = WeakSet()  # those that compute on the pool now
        self._deciding = threading.RLock()
        self._library.herd_mask.argtypes = [pointer, size, pointer]
        self.use_threads(default_threads())

    @property
    def path(self) -> str:
        """The instruction set in use: "portable", "avx2", "avxvnni" or "vnni"."""
        name: bytes = self._library.herd_path()
        return name.decode()

    def use_path(self, path: str) -> None:
        """Hold to an instruction set. Raises `UsageError` if the machine lacks it."""
        if self._library.herd_use_path(path.encode()):
            raise UsageError(f"this machine cannot run the native kernels on {path!r}", f"there are: {', '.join(_PATHS)}, and off")

    def use_threads(self, count: int) -> None:
        """How many threads a product uses, the caller's included, for the whole process and whoever does not ask for a number."""
        with self._deciding:
            self._use(count)
            self._chosen = count

    def share(self, sharer: object, count: int = 0) -> int:
        """Let `sharer` compute on the pool for as long as it lives; gives back the number of threads.

        count: of threads, 0 for as many as there are. There is one pool, so the first of those that are alive decides, and who asks
        for another number later is refused with a `UsageError`.
        """
        with self._deciding:
            if not self._sharing:
                self._use(count or self._chosen)
            elif count not in (0, self.threads):
                about = f"{len(self._sharing)} run on its {self.threads} threads"
                raise UsageError(
                    f"threads is {count}; the engines of a process share one pool, and {about}",
                    "leave threads out, or let go of the other models first",
                    param="threads",
                )
            self._sharing.add(sharer)
            return self.threads

    def _use(self, count: int) -> None:
        if not 1 <= count <= 1024:
            raise UsageError(f"threads is {count}; it must lie between 1 and 1024", param="threads")
        if self._library.herd_use_threads(count):
            raise ResourceError(f"the system gives this process no {count} threads", "lower --threads, or raise its limits")
        self.threads = count

    def round(self, x: Tensor, bits: int = 16) -> tuple[Tensor, Tensor]:
        """`herd.ops.int4.round_activations`: [T, K] float32 -> codes [T, K] int16, scales [T, K/32] float32."""
        T, K = x.shape
        x = x.contiguous()
        codes, scales = torch.empty(T, K, dtype=torch.int16), torch.empty(T, K // 32)
        _check(self._library.herd_round(x.data_ptr(), T, K, bits // 8, codes.data_ptr(), scales.data_ptr()))
        return codes, scales

    def product(self, x: Tensor, blocks: Tensor, counts: Tensor | None = None, *, bits: int = 16) -> Tensor:
        """x [R, K] float32, rounded to 8 or 16 bits, times blocks [N/8, K/g, B] -> [R, N].

        With counts [E] int64, x sorted by expert times [E, N/8, K/g, B].
        """
        kind = kind_of(blocks)
        *experts, row_blocks, groups, _ = blocks.shape
        R, K = x.shape
        N, num = row_blocks * 8, experts[0] if experts else 1
        assert groups * kind.group == K and blocks.is_contiguous() and x.dtype == torch.float32
        if counts is None:
            counts = torch.tensor([R])
        assert counts.dtype == torch.int64 and len(counts) == num
        x, counts = x.contiguous(), counts.contiguous()
        y = torch.empty(R, N)
        _check(
            self._library.herd_product(
                blocks.data_ptr(),
                num,
                N,
                K,
                kind.group,
                kind.bits,
                kind.has_minimum,
                bits // 8,
                x.data_ptr(),
                counts.data_ptr(),
                y.data_ptr(),
            )
        )
        return y

    def sample(self, logits: Tensor, draw: Draw) -> int:
        """`herd.ops.sample.sample_plain`: logits [V] float32 -> a token."""
        assert logits.dtype == torch.float32 and logits.dim() == 1
        logits, token = logits.contiguous(), ctypes.c_int64()
        table = tables.Draw(draw.scale, draw.top_p, draw.point, draw.top_k, draw.least)
        fault = self._library.herd_sample(logits.data_ptr(), len(logits), ctypes.byref(table), ctypes.byref(token))
        if fault == _NOT_NUMBERS:
            raise not_numbers()
        _check(fault)
        return token.value

    def mask(self, logits: Tensor, bits: Tensor) -> None:
        """`herd.ops.sample.mask_plain`: logits [V] float32 are changed in place; bits [V/32] int32."""
        assert logits.dtype == torch.float32 and bits.dtype == torch.int32 and logits.is_contiguous() and bits.is_contiguous()
        assert len(bits) * 32 >= len(logits)
        _check(self._library.herd_mask(logits.data_ptr(), len(logits), bits.data_ptr()))

    def read_gb_s(self, data: Tensor) -> float:
        """How fast all threads together read memory: GB/s over `data`, which should be far larger than the caches."""
        start = time.perf_counter()
        _check(self._library.herd_read(data.data_ptr(), data.nbytes))
        return data.nbytes / (time.perf_counter() - start) / 1e9

    def peak_gop_s(self) -> float:
        """How fast all threads together multiply and add bytes in registers: 1e9 operations a second, two for each pair."""
        start = time.perf_counter()
        operations: float = self._library.herd_peak()
        return operations / (time.perf_counter() - start) / 1e9

    def step(self, model: tables.Model, step: tables.Step) -> None:
        """All layers of a model for one step; `step.x` goes in as embeddings and comes out as hidden states."""
        _check(self._library.herd_step(ctypes.byref(model), ctypes.byref(step)))


def default_threads() -> int:
    """The cores that this process may run on: its affinity, two threads of one core counted once, and its cgroup's quota if it has one."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    siblings = [Path(f"/sys/devices/system/cpu/cpu{i}/topology/thread_siblings_list") for i in os.sched_getaffinity(0)]
    cores = len({file.read_text() if file.is_file() else str(file) for file in siblings})
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        limit, period = quota.read_text().split()
        if limit != "max":
            cores = min(cores, max(1, int(limit) // int(period)))
    return cores


def _check(fault: int) -> None:
    assert fault == 0, f"native kernel: {_FAULTS.get(fault, fault)}"


@cache
def kernels() -> Kernels | None:
    """The native kernels, or None where they were not built or HERD_NATIVE=off. Says so once."""
    wish = os.environ.get("HERD_NATIVE", "")
    if wish == "off":
        return None
    chosen = os.environ.get("HERD_NATIVE_LIBRARY")
    files = [Path(chosen)] if chosen else sorted(Path(__file__).parent.glob("_kernels*.so"))
    if not files:
        log.warning("herd's native kernels are not built, so 4-bit weights run slowly; install a C++ compiler and herd again")
        return None
    try:
        loaded = Kernels(files[0])
    except (OSError, AttributeError) as error:
        raise UsageError(
            f"{files[0]} holds no native kernels of this herd: {error}", "install herd again, or unset HERD_NATIVE_LIBRARY"
        ) from error
    if wish:
        loaded.use_path(wish)
    return loaded
