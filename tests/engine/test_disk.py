"""The store on the disk: what it gives back is what was put in, or nothing, whatever happens to the disk, the files or the writer.

HERD_KILLS=200 kills that many writers instead of 20.
"""

import errno
import fcntl
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from herd.engine import kvfile
from herd.engine.disk import RETRY_S, DiskStore, fingerprint
from herd.errors import ResourceError, UsageError
from herd.model.presets import TINY
from tests.clock import Clock

from .stored import FINGERPRINT, key_of, parts_of

OTHER = "f" * 32
PLENTY = 1 << 40


@contextmanager
def opened(folder: Path, limit_bytes: int = PLENTY, name: str = FINGERPRINT, **choices: int) -> Iterator[DiskStore]:
    store = DiskStore(folder, name, limit_bytes, Clock(1e6, step=1), **choices)
    try:
        yield store
    finally:
        store.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DiskStore]:
    with opened(tmp_path) as store:
        yield store


def put(store: DiskStore, key: bytes, parent: bytes | None = None) -> None:
    """Store the parts that belong to a key, and wait."""
    assert store.put(key, parts_of(key), parent)
    assert store.flush(30)


def is_exact(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    """Bit for bit, NaN included."""
    same_kinds = {name: (t.dtype, t.shape) for name, t in found.items()} == {name: (t.dtype, t.shape) for name, t in wanted.items()}
    return same_kinds and all(torch.equal(bits(found[name]), bits(wanted[name])) for name in wanted)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def file_of(folder: Path, key: bytes, name: str = FINGERPRINT) -> Path:
    return folder / name / f"{key.hex()}.kv"


def folder_bytes(folder: Path) -> int:
    """Of stored chunks and those being written, each counted once though it may be renamed meanwhile; nothing new begins while we count."""
    sizes = {}
    with (folder / "lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for path in folder.glob("*/*"):
            with suppress(FileNotFoundError):
                sizes[path.stat().st_ino] = path.stat().st_size
    return sum(sizes.values())


def test_all_dtypes_come_back_bit_for_bit(store: DiskStore, tmp_path: Path) -> None:
    made = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (3, 2, 4, 64), dtype=torch.uint8, generator=made)  # [P, G, S, bytes]: NaNs and infinities among them
    parts = {str(dtype): raw.view(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.int32)}
    parts |= {"3.key_scales": raw.view(torch.float32)[..., 0], "strided": raw.transpose(0, 2), "empty": raw[:0], "scalar": raw[0, 0, 0, 0]}
    key = bytes(range(32))
    assert store.has([key]) == 0 and store.get(key) is None
    assert store.put(key, parts) and store.flush(30)
    assert store.has([key]) == 1
    found = store.get(key)
    assert found is not None and is_exact(found, parts) and list(found) == list(parts)
    with opened(tmp_path) as again:
        found = again.get(key)
        assert found is not None and is_exact(found, parts)
    stats = store.stats()
    assert (stats.written, stats.hits, stats.misses, stats.queued, stats.failed_writes) == (1, 1, 1, 0, 0)
    assert stats.written_bytes == file_of(tmp_path, key).stat().st_size


def test_data_is_aligned_and_private(store: DiskStore, tmp_path: Path) -> None:
    key = key_of(1)
    put(store, key)
    content = file_of(tmp_path, key).read_bytes()
    head, offsets = kvfile.encode(kvfile.Chain(FINGERPRINT, key, None), parts_of(key), {})
    for name, tensor in parts_of(key).items():
        assert offsets[name] % 64 == 0
        assert content[offsets[name] : offsets[name] + tensor.nbytes] == bytes(bits(tensor).numpy())
    assert len(head) == 32 + int.from_bytes(content[8:16], "little")
    assert file_of(tmp_path, key).stat().st_mode & 0o77 == 0


def test_has_counts_up_to_the_first_gap(store: DiskStore, tmp_path: Path) -> None:
    keys = [key_of(i) for i in range(5)]
    for i, key in enumerate(keys[:4]):
        put(store, key, keys[i - 1] if i else None)
    file_of(tmp_path, keys[2]).unlink()
    assert store.has(keys) == 2 and store.has([]) == 0 and store.has(keys[3:]) == 1


def test_another_fingerprint_finds_nothing(store: DiskStore, tmp_path: Path) -> None:
    put(store, key_of(0))
    with opened(tmp_path, name=OTHER) as other:
        assert other.has([key_of(0)]) == 0 and other.get(key_of(0)) is None
        shutil.copy(file_of(tmp_path, key_of(0)), file_of(tmp_path, key_of(0), OTHER))
        assert other.get(key_of(0)) is None and other.stats().broken == 1


def test_a_file_under_another_key_is_refused(store: DiskStore, tmp_path: Path) -> None:
    put(store, key_of(0))
    file_of(tmp_path, key_of(0)).rename(file_of(tmp_path, key_of(1)))
    assert store.has([key_of(1)]) == 1
    assert store.get(key_of(1)) is None and store.has([key_of(1)]) == 0


def test_what_is_there_is_not_written_again(store: DiskStore, tmp_path: Path) -> None:
    put(store, key_of(0))
    before = file_of(tmp_path, key_of(0)).stat()
    put(store, key_of(0))
    after = file_of(tmp_path, key_of(0)).stat()
    assert after.st_ino == before.st_ino and after.st_mtime_ns > before.st_mtime_ns
    assert (store.stats().written, store.stats().known) == (1, 1)


def damaged(store: DiskStore, path: Path, key: bytes, content: bytes) -> bool:
    """Whether a file of that content is refused; if it is not, it must read back exactly."""
    path.write_bytes(content)
    assert store.has([key]) == 1
    found = store.get(key)
    if found is None:
        assert not path.exists()
        return True
    assert is_exact(found, parts_of(key))
    return False


def test_a_flipped_bit_never_gives_wrong_bytes(store: DiskStore, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    key, path = key_of(7), file_of(tmp_path, key_of(7))
    put(store, key_of(6))
    put(store, key, key_of(6))
    content = path.read_bytes()
    head, offsets = kvfile.encode(kvfile.Chain(FINGERPRINT, key, key_of(6)), parts_of(key), {})
    matters = set(range(len(head)))
    for name, tensor in parts_of(key).items():
        matters |= set(range(offsets[name], offsets[name] + tensor.nbytes))
    assert len(content) > len(matters) > len(head)  # between the parts there is padding
    for at in range(len(content)):
        for bit in range(8) if at < 64 else (at % 8,):
            wrong = bytearray(content)
            wrong[at] ^= 1 << bit
            assert damaged(store, path, key, bytes(wrong)) == (at in matters), (at, bit)
    assert store.stats().broken > len(matters)
    assert len(caplog.records) == 1 and "damaged" in caplog.text


def test_a_file_of_any_other_length(store: DiskStore, tmp_path: Path) -> None:
    key, path = key_of(8), file_of(tmp_path, key_of(8))
    put(store, key)
    content = path.read_bytes()
    for length in [*range(0, len(content), 5), len(content) - 1]:
        assert damaged(store, path, key, content[:length])
    assert damaged(store, path, key, b"\xff" * len(content)) and damaged(store, path, key, bytes(len(content)))
    assert not damaged(store, path, key, content + b"more")


def test_deleted_under_us(store: DiskStore, tmp_path: Path) -> None:
    put(store, key_of(0))
    assert store.has([key_of(0)]) == 1
    file_of(tmp_path, key_of(0)).unlink()
    assert store.get(key_of(0)) is None and store.stats().misses == 1 and store.stats().broken == 0
    shutil.rmtree(tmp_path / FINGERPRINT)
    (tmp_path / "lock").unlink()
    put(store, key_of(1))
    assert store.get(key_of(1)) is not None


def test_what_was_read_stays_whatever_becomes_of_the_file(store: DiskStore, tmp_path: Path) -> None:
    put(store, key_of(0))
    found = store.get(key_of(0))
    path = file_of(tmp_path, key_of(0))
    path.write_bytes(bytes(path.stat().st_size))  # in place
    os.truncate(path, 10)  # a map would end the process here
    path.unlink()
    assert found is not None and is_exact(found, parts_of(key_of(0)))


def test_a_disk_that_cannot_be_read(store: DiskStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store, key_of(0))

    def fail(number: int) -> Callable[..., None]:
        def read_into(file: object, out: object) -> None:
            raise OSError(number, os.strerror(number))

        return read_into

    with monkeypatch.context() as patch:
        patch.setattr(kvfile, "_read_into", fail(errno.EMFILE))
        assert store.get(key_of(0)) is None and store.stats().failed_reads == 1
    assert store.get(key_of(0)) is not None  # it was not the file's fault
    with monkeypatch.context() as patch:
        patch.setattr(kvfile, "_read_into", fail(errno.EIO))
        assert store.get(key_of(0)) is None and store.stats().broken == 1
    assert store.has([key_of(0)]) == 0


def test_a_full_disk_costs_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def full(write: object, data: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with opened(tmp_path) as store:
        put(store, key_of(0))
        with monkeypatch.context() as patch:
            patch.setattr(kvfile, "write_all", full)
            for i in (1, 2, 3):
                store.put(key_of(i), parts_of(key_of(i)))
                store.flush(30)
                if i == 2:
                    store._clock.now += RETRY_S  # type: ignore[attr-defined]
        assert [record.levelno for record in caplog.records] == [logging.WARNING] and "No space left" in caplog.text
        assert store.get(key_of(0)) is not None
        stats = store.stats()
        assert (stats.failed_writes, stats.dropped, stats.written) == (2, 1, 1)
        assert [path.name for path in (tmp_path / FINGERPRINT).iterdir()] == [file_of(tmp_path, key_of(0)).name]
        store._clock.now += RETRY_S  # type: ignore[attr-defined]
        put(store, key_of(1))
        assert store.stats().written == 2


@contextmanager
def mounted(where: Path, options: str) -> Iterator[None]:
    """A filesystem in memory of its own; skips where this user may mount none."""
    where.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", where], capture_output=True).returncode:
        pytest.skip("only root may mount")
    try:
        yield
    finally:
        subprocess.run(["umount", where], check=True)


def test_a_disk_that_is_really_full(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with mounted(tmp_path / "small", "size=1m"), opened(tmp_path / "small") as store:
        keys = [key_of(i) for i in range(40)]
        for i, key in enumerate(keys):
            store.put(key, parts_of(key, 20_000), keys[i - 1] if i else None)
            store.flush(30)
        num_stored = store.has(keys)
        assert 3 < num_stored < 40 and store.stats().failed_writes == 1
        assert all(is_exact(store.get(key) or {}, parts_of(key, 20_000)) for key in keys[:num_stored])
        assert len(caplog.records) == 1 and not list((tmp_path / "small").glob("*/*.partial"))
        file_of(tmp_path / "small", keys[0]).unlink()
        store._clock.now += RETRY_S  # type: ignore[attr-defined]
        assert store.put(keys[0], parts_of(keys[0], 20_000)) and store.flush(30)
        assert store.has(keys) == num_stored


def test_a_slow_disk_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, write_all = threading.Event(), kvfile.write_all

    def slow(write: object, data: object) -> None:
        assert go.wait(30)
        write_all(write, data)  # type: ignore[arg-type]

    monkeypatch.setattr(kvfile, "write_all", slow)
    size = kvfile.size(kvfile.Chain(FINGERPRINT, key_of(0), None), parts_of(key_of(0)))
    with opened(tmp_path, queue_bytes=3 * size) as store:
        start = time.perf_counter()
        taken = [store.put(key_of(i), parts_of(key_of(i))) for i in range(10)]
        assert time.perf_counter() - start < 5
        assert taken == [True] * 3 + [False] * 7
        assert store.put(key_of(0), parts_of(key_of(0)))  # is waiting already
        assert store.has([key_of(0)]) == 0 and not store.flush(0.01)
        stats = store.stats()
        assert (stats.queued, stats.queued_bytes, stats.dropped) == (3, 3 * size, 7)
        go.set()
        assert store.flush(30) and store.has([key_of(i) for i in range(10)]) == 3
    assert not store.put(key_of(9), parts_of(key_of(9)))  # closed
    assert store.get(key_of(0)) is not None


def test_a_chunk_larger_than_the_queue_is_written(tmp_path: Path) -> None:
    with opened(tmp_path, queue_bytes=1) as store:
        put(store, key_of(0))
        assert store.has([key_of(0)]) == 1


def test_a_bug_in_writing_does_not_end_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with opened(tmp_path) as store:
        with monkeypatch.context() as patch:
            patch.setattr(kvfile, "write", lambda *_: 1 / 0)
            put(store, key_of(0))
        assert "ZeroDivisionError" in caplog.text and store.stats().failed_writes == 1
        store._clock.now += RETRY_S  # type: ignore[attr-defined]
        put(store, key_of(0))
        assert store.has([key_of(0)]) == 1


def stored(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*/*.kv")}


def size_of(key: bytes, parent: bytes | None) -> int:
    return kvfile.size(kvfile.Chain(FINGERPRINT, key, parent), parts_of(key))


def test_the_limit_is_kept_leaf_first(tmp_path: Path) -> None:
    a, b, c, d, e = (key_of(i) for i in range(5))
    size = size_of(b, a)
    with opened(tmp_path, 4 * size) as store:
        put(store, a)
        put(store, b, a)
        put(store, c, b)
        put(store, d)
        assert store.get(a) and store.get(d)  # b and c are the oldest now, and c is the leaf of the two
        put(store, e)
        assert stored(tmp_path) == {key.hex() for key in (a, b, d, e)}
        store.get(b)
        put(store, c, b)  # d is the leaf that was used least recently
        assert stored(tmp_path) == {key.hex() for key in (a, b, c, e)}
        assert store.stats().evicted == 2 and store.stats().entries == 3 and folder_bytes(tmp_path) <= 4 * size


def test_nothing_goes_for_what_builds_on_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = [key_of(i) for i in range(5)]
    with opened(tmp_path, 3 * size_of(keys[1], keys[0])) as store:
        for i, key in enumerate(keys):
            put(store, key, keys[i - 1] if i else None)
        assert store.has(keys) == 3 and store.stats().refused == 2 and len(caplog.records) == 1


def test_chunks_without_their_beginning_go_first(tmp_path: Path) -> None:
    a, b, c, d, e = (key_of(i) for i in range(5))
    with opened(tmp_path, 4 * size_of(b, a)) as store:
        put(store, d)
        put(store, a)
        put(store, b, a)
        put(store, c, b)
        file_of(tmp_path, a).unlink()
        store.get(c)
        put(store, e)
        put(store, a)
        assert stored(tmp_path) == {key.hex() for key in (a, b, d, e)}


def test_too_large_for_the_limit(tmp_path: Path) -> None:
    with opened(tmp_path, size_of(key_of(0), None) - 1) as store:
        put(store, key_of(0))
        assert store.stats().refused == 1 and not stored(tmp_path)


def test_a_lower_limit_is_kept_from_the_start_and_for_all_models(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        for i in range(6):
            put(store, key_of(i))
    with opened(tmp_path, 4 * size_of(key_of(0), None), OTHER) as other:
        assert stored(tmp_path) == {key_of(i).hex() for i in range(2, 6)}
        put(other, key_of(9))
        assert stored(tmp_path) == {key_of(i).hex() for i in (3, 4, 5, 9)}


def victims(state: dict[bytes, tuple[bytes | None, int]], new: bytes, parent: bytes | None, most: int) -> set[bytes]:
    """What is left when room for one more of the same size is made, by the plainest loop."""
    left = dict(state)
    kept = set()
    while parent in left:
        kept.add(parent)
        parent = left[parent][0]

    def has_start(key: bytes | None) -> bool:
        return key is None or (key in left and has_start(left[key][0]))

    while len(left) + 1 > most:
        leaves = [key for key in left if key not in kept and not any(above == key for above, _ in left.values())]
        if not leaves:
            return set(state)
        del left[min(leaves, key=lambda key: (has_start(key), left[key][1]))]
    return {*left, new}


@pytest.mark.parametrize("seed", range(4))
def test_eviction_is_that_of_the_plainest_loop(tmp_path: Path, seed: int) -> None:
    dice, most = random.Random(seed), 8
    with opened(tmp_path, most * size_of(key_of(1), key_of(0)) + 100) as store:
        state: dict[bytes, tuple[bytes | None, int]] = {}
        for i in range(60):
            for key in dice.sample(sorted(state), min(len(state), 2)):
                store.get(key)
            if state and dice.random() < 0.1:
                file_of(tmp_path, dice.choice(sorted(state))).unlink()
            here = {bytes.fromhex(name) for name in stored(tmp_path)}
            state = {key: (state[key][0], file_of(tmp_path, key).stat().st_mtime_ns) for key in here}
            parent = dice.choice(sorted(state)) if state and dice.random() < 0.7 else None
            wanted = victims(state, key_of(i), parent, most)
            put(store, key_of(i), parent)
            assert {bytes.fromhex(name) for name in stored(tmp_path)} == wanted
            state = {key: state.get(key, (parent, 0)) for key in wanted}


def test_foreign_files_stay(tmp_path: Path) -> None:
    own = tmp_path / FINGERPRINT
    (own / ("a" * 64 + ".kv")).mkdir(parents=True)
    (tmp_path / "photos").mkdir()
    foreign = [tmp_path / "notes.txt", tmp_path / "photos" / f"{key_of(3).hex()}.kv", own / "README", own / "AB.kv", own / "ab.0.partial"]
    for path in foreign:
        path.write_bytes(b"mine" * 1000)
    with opened(tmp_path, 2 * size_of(key_of(0), None)) as store:
        for i in range(4):
            put(store, key_of(i))
        assert store.stats().evicted == 2
    assert all(path.read_bytes() == b"mine" * 1000 for path in foreign) and (own / ("a" * 64 + ".kv")).is_dir()


def test_folders_that_cannot_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match="no folder"):
            DiskStore(path, FINGERPRINT, 1)
    with pytest.raises(ResourceError, match="cannot be stored in /proc") as caught:
        DiskStore(Path("/proc/herd"), FINGERPRINT, 1)
    assert "may write" in caught.value.hint
    with pytest.raises(UsageError, match="limit_bytes is 0"):
        DiskStore(tmp_path / "new", FINGERPRINT, 0)


def test_a_folder_that_is_read_only(tmp_path: Path) -> None:
    with mounted(tmp_path / "fixed", "ro"), pytest.raises(ResourceError, match="Read-only"):
        DiskStore(tmp_path / "fixed", FINGERPRINT, 1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / FINGERPRINT).mkdir(mode=0o500)
    with pytest.raises(ResourceError, match="Permission denied"):
        DiskStore(tmp_path, FINGERPRINT, 1)


def test_fingerprints_differ_where_numbers_do() -> None:
    made = [
        fingerprint(TINY, "w", "bf16", 16),
        fingerprint(replace(TINY, rope_theta=1e4), "w", "bf16", 16),
        fingerprint(TINY, "v", "bf16", 16),
        fingerprint(TINY, "w", "int8", 16),
        fingerprint(TINY, "w", "bf16", 32),
        fingerprint(TINY, "w", "bf16", 16, "float32"),
    ]
    assert len(set(made)) == len(made) and made[0] == fingerprint(TINY, "w", "bf16", 16)


class Writers:
    """A process that starts writers, each a fork of it, so that what they import is read once."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.engine.stored"]
        root = Path(__file__).parents[2]
        self.process = subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._answer("") == "ready"

    def _answer(self, line: str) -> str:
        assert self.process.stdin and self.process.stdout
        if line:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def start(self, folder: Path, first: int, limit_bytes: int) -> int:
        """A writer of keys first, first + 1, ..., a chain, until it is killed; its process id, once it writes."""
        return int(self._answer(f"{first} {limit_bytes} {folder}"))

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        assert self._answer(f"wait {pid}") == "gone"

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def writers() -> Iterator[Writers]:
    made = Writers()
    yield made
    made.close()


def check(store: DiskStore, keys: Sequence[bytes]) -> int:
    """Read whatever is there; how many that were."""
    claimed = [key for key in keys if store.has([key])]
    for key in claimed:
        found = store.get(key)
        assert found is not None and is_exact(found, parts_of(key, None))
    return len(claimed)


def test_killed_writers_lose_only_what_they_were_writing(tmp_path: Path, writers: Writers) -> None:
    num_kills, dice = int(os.environ.get("HERD_KILLS", "20")), random.Random(0)
    limit, num_left, num_read = 40_000_000, 0, 0
    for i in range(num_kills):
        pid = writers.start(tmp_path, 1000 * i, limit)
        time.sleep(dice.random() * 0.15)
        writers.kill(pid)
        num_left += len(list(tmp_path.glob("*/*.partial")))
        assert folder_bytes(tmp_path) <= limit
        with opened(tmp_path, limit) as store:
            assert not list(tmp_path.glob("*/*.partial"))
            num_read += check(store, [key_of(n) for n in range(max(0, 1000 * (i - 2)), 1000 * i + 500)])
            assert store.stats().broken == store.stats().misses == 0
    assert num_left > num_kills // 4 and num_read > num_kills  # many were killed in the middle of a file


def test_a_file_gets_its_name_while_nobody_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writing, go, write = threading.Event(), threading.Event(), kvfile.write

    def slow(*arguments: object) -> None:
        writing.set()
        assert go.wait(30)
        write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(kvfile, "write", slow)
    with opened(tmp_path) as store, (tmp_path / "lock").open("ab") as lock:
        store.put(key_of(0), parts_of(key_of(0)))
        assert writing.wait(30)
        fcntl.flock(lock, fcntl.LOCK_EX)
        go.set()
        assert not store.flush(0.2) and store.has([key_of(0)]) == 0
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert store.flush(30) and store.has([key_of(0)]) == 1


def test_processes_share_a_folder(tmp_path: Path, writers: Writers) -> None:
    """Two write the same chain and one another, into too small a folder, while this one reads, writes and counts."""
    limit, num_hits = 30_000_000, 0
    running = [writers.start(tmp_path, first, limit) for first in (0, 0, 5000)]
    with opened(tmp_path, limit) as store:
        end = time.monotonic() + 4
        while time.monotonic() < end:
            for path in tmp_path.glob("*/*.kv"):
                key = bytes.fromhex(path.stem)
                found = store.get(key)
                num_hits += found is not None
                assert found is None or is_exact(found, parts_of(key, None))
            store.put(key_of(9999), parts_of(key_of(9999), None))
            assert folder_bytes(tmp_path) <= limit
        for pid in running:
            writers.kill(pid)
        assert num_hits > 5 and store.stats().broken == 0 and store.stats().failed_writes == 0


def test_what_waits_is_written_when_the_program_ends(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from herd.engine.disk import DiskStore; from tests.engine.stored import *; "
        "store = DiskStore(Path(sys.argv[1]), FINGERPRINT, 1 << 40); "
        "[store.put(key_of(i), parts_of(key_of(i), 1_000_000)) for i in range(5)]"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr
    with opened(tmp_path) as store:
        assert store.has([key_of(i) for i in range(5)]) == 5
