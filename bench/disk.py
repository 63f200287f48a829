"""What does a stored prefix cost? One chunk of Scout's global layers, written, read and checked, against safetensors and the bare disk.

    OMP_NUM_THREADS=1 python bench/disk.py FOLDER

FOLDER is on the disk in question. The bound of writing is the same bytes from one buffer and fsync, that of reading `readinto` one buffer.
safetensors checks nothing; its file is mapped, so its tensors are summed up to read them, and so are ours. "cold": the system was asked to
forget the file before (the host of a virtual machine may remember it).
"""

import argparse
import mmap
import os
import shutil
import statistics
import time
import zlib
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from herd.engine.disk import DiskStore

LAYERS, TOKENS, HEADS, PAGE, WIDTH = 12, 8192, 8, 16, 128  # of Scout that are global, in a chunk, of keys, tokens per page, of a head
KEY = bytes(32)


def chunk(dtype: torch.dtype) -> dict[str, Tensor]:
    shape = (TOKENS // PAGE, HEADS, PAGE, WIDTH)  # [P, G, S, K]
    kinds = ("keys", "values")
    parts = {f"{i}.{kind}": torch.randint(-127, 128, shape, dtype=torch.int8).to(dtype) for i in range(LAYERS) for kind in kinds}
    if dtype == torch.int8:
        parts |= {f"{i}.{kind}_scales": torch.rand(shape[:-1]) for i in range(LAYERS) for kind in kinds}
    return parts


def seconds(repetitions: int, run: Callable[[], object], before: Callable[[], object]) -> tuple[float, float]:
    """The median and the best."""
    found = []
    for _ in range(repetitions):
        before()
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return statistics.median(found), min(found)


def forget(path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write_bare(path: Path, data: memoryview) -> None:
    with path.open("wb", buffering=0) as file:
        file.write(data)
        os.fsync(file.fileno())


def write_safetensors(path: Path, parts: dict[str, Tensor]) -> None:
    save_file(parts, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def read_bare(path: Path, data: memoryview) -> None:
    with path.open("rb", buffering=0) as file:
        file.readinto(data)


def check_map(path: Path) -> None:
    with path.open("rb") as file:
        zlib.crc32(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def touched(parts: dict[str, Tensor] | None) -> None:
    assert parts is not None
    for tensor in parts.values():
        tensor.view(-1).view(torch.int32).max()


def measure(folder: Path, dtype: torch.dtype, repetitions: int) -> None:
    parts = chunk(dtype)
    num_bytes = sum(tensor.nbytes for tensor in parts.values())
    raw = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8).numpy().data
    bare, rival = folder / "bare", folder / "rival.safetensors"
    store = DiskStore(folder / "store", "0" * 32, 1 << 40)
    ours = folder / "store" / ("0" * 32) / f"{KEY.hex()}.kv"

    def put() -> None:
        assert store.put(KEY, parts) and store.flush()

    rows: list[tuple[str, Callable[[], object], Callable[[], object]]] = [
        ("write: bare", lambda: write_bare(bare, raw), lambda: bare.unlink(missing_ok=True)),
        ("write: safetensors, fsync", lambda: write_safetensors(rival, parts), lambda: rival.unlink(missing_ok=True)),
        ("write: herd", put, lambda: ours.unlink(missing_ok=True)),
    ]
    for how, before in (("warm", Path.stat), ("cold", forget)):
        rows += [
            (f"read {how}: bare", lambda: read_bare(bare, raw), lambda b=before: b(bare)),
            (f"read {how}: crc32 of a map", lambda: check_map(bare), lambda b=before: b(bare)),
            (f"read {how}: safetensors, unchecked", lambda: touched(load_file(rival)), lambda b=before: b(rival)),
            (f"read {how}: herd", lambda: touched(store.get(KEY)), lambda b=before: b(ours)),
        ]
    rows += [("crc32", lambda: zlib.crc32(raw), int), ("blake2b", lambda: blake2b(raw).digest(), int)]
    print(f"\n{dtype}, {num_bytes / 1e6:.0f} MB\n\n| what | ms, median | best | GB/s, median | best |\n|---|---|---|---|---|")
    for name, run, before in rows:
        median, best = seconds(repetitions, run, before)
        rates = f"{num_bytes / median / 1e9:.2f} | {num_bytes / best / 1e9:.2f}"
        print(f"| {name} | {median * 1e3:.0f} | {best * 1e3:.0f} | {rates} |", flush=True)
    store.close()


def measure_names(folder: Path, count: int) -> None:
    """What the folder itself costs with many chunks in it."""
    store = DiskStore(folder / "names", "0" * 32, 1 << 40)
    keys = [bytes([1]) + i.to_bytes(31, "little") for i in range(count)]
    for i, key in enumerate(keys):
        store.put(key, {"keys": torch.zeros(16)}, keys[i - 1] if i % 100 else None)
        store.flush()
    _, took = seconds(5, lambda: store.has(keys), int)
    more = iter(range(10**6, 10**7))

    def one() -> None:
        store.put(next(more).to_bytes(32, "little"), {"keys": torch.zeros(16)})
        store.flush()

    _, plain = seconds(5, one, int)
    store.close()
    limit = store.stats().bytes
    store = DiskStore(folder / "names", "0" * 32, limit)
    _, first = seconds(1, one, int)
    _, later = seconds(5, one, int)
    store.close()
    print(
        f"\nbest of 5: has {took / count * 1e6:.1f} us a key; one tiny chunk more in a folder of {count:,} {plain * 1e3:.0f} ms, ", end=""
    )
    print(f"where another has to go {later * 1e3:.0f} ms, the first time {first * 1e3:.0f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--names", type=int, default=1000)
    options = parser.parse_args()
    torch.manual_seed(0)
    folder = options.folder / "herd-bench-disk"
    folder.mkdir(parents=True)
    try:
        for dtype in (torch.bfloat16, torch.int8):
            measure(folder, dtype, options.repetitions)
        measure_names(folder, options.names)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
