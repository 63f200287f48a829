"""Prefixes on the disk: keys and values of whole chunks, found again by the hash of all tokens up to their end.

Where a chunk ends, a prefix needs no local page: no later token's local layers look back across that border. What is left are the pages of
the global layers, a quarter of the bytes, and those of one chunk are one file (`kvfile.py`) in a folder (`kvfolder.py`). A key says which
tokens; the fingerprint, which numbers they become.

One thread writes. Whoever computes hands over and goes on: what does not fit in the queue is dropped. A disk that is full or broken costs
its prefixes and one warning; it is tried again a minute later.
"""

import atexit
import errno
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from hashlib import blake2b
from pathlib import Path

from torch import Tensor

from herd.engine import kvfile
from herd.engine.kvfile import Chain
from herd.engine.kvfolder import KvFolder
from herd.errors import ResourceError, UsageError
from herd.log import log
from herd.model.config import ModelConfig

QUEUE_BYTES = 1 << 30
RETRY_S = 60.0  # without writing, after a write has failed


def fingerprint(config: ModelConfig, weights_identity: str, kv: str, page_tokens: int, computation: str = "") -> str:
    """What must be equal for stored keys and values to be those that a model would compute.

    weights_identity: from `herd/checkpoint/identity.py`.  kv: the dtype they are kept in, not "auto".  computation: whatever else changes
    the numbers, as the dtype that the model computes in and the bits of its activations.
    """
    facts = [kvfile.VERSION, asdict(config), weights_identity, kv, page_tokens, computation]
    return blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class DiskStats:
    """What a store has done since it was opened, and what its folder held when room was last made."""

    entries: int  # chunks in the folder, of all models
    bytes: int  # of them, and of those being written
    limit_bytes: int
    queued: int  # chunks that wait to be written
    queued_bytes: int
    hits: int  # chunks read
    hit_bytes: int
    misses: int  # chunks asked for that are not there, or no longer
    broken: int  # files that were not what was written, and were removed
    failed_reads: int  # by the system; the file may be sound
    written: int
    written_bytes: int
    known: int  # handed over, and there already
    dropped: int  # handed over while the queue was full, or writing paused
    refused: int  # no room could be made within the limit, or the chunk before is not there
    failed_writes: int
    evicted: int


@dataclass(frozen=True, slots=True)
class _Put:
    """A chunk that waits."""

    chain: Chain
    parts: Mapping[str, Tensor]
    num_bytes: int


class DiskStore:
    """Chunks of one model in a folder. `put` and `has` never wait for data; `get` reads. Any thread may call."""

    def __init__(
        self, folder: Path, fingerprint: str, limit_bytes: int, clock: Callable[[], float] = time.time, *, queue_bytes: int = QUEUE_BYTES
    ) -> None:
        """folder: made when missing, shared with other models and processes.  limit_bytes: of all files in it.

        clock: seconds; tells when a chunk was used.  queue_bytes: that may wait to be written; one chunk always may.
        Raises `UsageError` or `ResourceError` where nothing can be stored.
        """
        if limit_bytes < 1:
            raise UsageError(f"limit_bytes is {limit_bytes:,}; it must be at least 1", "give no folder to store nothing")
        try:
            self._folder = KvFolder(folder, fingerprint, limit_bytes)
        except (FileExistsError, NotADirectoryError) as error:
            raise UsageError(f"prefixes cannot be stored in {folder}: it is no folder, or lies in none", "name another") from error
        except OSError as error:
            what = f"prefixes cannot be stored in {folder}: {error.strerror}"
            raise ResourceError(what, "name a folder that herd may write to, on a filesystem that has locks") from error
        self.fingerprint, self.limit_bytes, self.queue_bytes = fingerprint, limit_bytes, queue_bytes
        self._clock, self._retry_at = clock, float("-inf")
        self._changed = threading.Condition()  # guards what follows
        self._queue: dict[bytes, _Put] = {}  # in order; the first is being written
        self._counts: Counter[str] = Counter()
        self._warned: set[str] = set()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="herd-disk", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # python must not end under a thread that is in the middle of a write

    def has(self, keys: Sequence[bytes]) -> int:
        """How many of the first keys are there, without a gap."""
        return next((i for i, key in enumerate(keys) if not self._is_there(key)), len(keys))

    def get(self, key: bytes) -> dict[str, Tensor] | None:
        """The tensors of a chunk, on the CPU and the caller's own, or None where there is no sound copy of it."""
        path = self._folder.path(key)
        try:
            parts = kvfile.read(path, self.fingerprint, key)
        except FileNotFoundError:
            self._count(misses=1)
            return None
        except (ValueError, OSError) as error:
            if isinstance(error, OSError) and error.errno != errno.EIO:  # too many open files, no permission: no fault of the file's
                self._count(failed_reads=1)
                self._warn("read", "a stored prefix cannot be read and is computed instead (more are only counted): %s", error)
                return None
            self._count(broken=1)
            self._warn("broken", "a stored prefix is damaged and removed (more are only counted): %s: %s", path, error)
            with suppress(OSError):
                path.unlink()
            return None
        self._touch(key)
        self._count(hits=1, hit_bytes=sum(tensor.nbytes for tensor in parts.values()))
        return parts

    def put(self, key: bytes, parts: Mapping[str, Tensor], parent: bytes | None = None) -> bool:
        """Hand over a chunk to be written; False when it is dropped. `has` sees it once it is written.

        parts: not copied, so nobody may write to them any more; what is on a GPU takes room there until it is written.
        parent: key of the chunk before, None for a first one.
        """
        chain = Chain(self.fingerprint, key, parent)
        fresh = _Put(chain, parts, kvfile.size(chain, parts))
        with self._changed:
            if key in self._queue:
                return True
            is_full = bool(self._queue) and self._queued_bytes() + fresh.num_bytes > self.queue_bytes
            if is_full or self._is_closed or self._is_paused():
                self._counts["dropped"] += 1
                return False
            self._queue[key] = fresh
            self._changed.notify_all()
        return True

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until all that was handed over is written or given up; False when that takes longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue, timeout_s)

    def close(self) -> None:
        """Write what waits, and end. What is there can still be read."""
        atexit.unregister(self.close)
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()

    def stats(self) -> DiskStats:
        with self._changed:
            counts = {field.name: self._counts[field.name] for field in fields(DiskStats)}
            counts |= {"limit_bytes": self.limit_bytes, "queued": len(self._queue), "queued_bytes": self._queued_bytes()}
        held = self._folder
        return DiskStats(**counts | {"entries": held.num_entries, "bytes": held.num_bytes, "evicted": held.num_evicted})

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._is_closed)
                if not self._queue:
                    return
                key = next(iter(self._queue))
            self._write_next(key)
            with self._changed:
                del self._queue[key]
                self._changed.notify_all()

    def _write_next(self, key: bytes) -> None:
        if self._is_paused():
            self._count(dropped=1)
            return
        try:
            self._write(self._queue[key])
        except Exception as error:  # whatever it was, the engine goes on, and so do later writes
            self._retry_at = self._clock() + RETRY_S
            self._count(failed_writes=1)
            kind = (isinstance(error, OSError) and error.errno) or type(error).__name__
            why = f"{type(error).__name__}: {error}"
            self._warn(f"write {kind}", "a prefix could not be stored, and for %d s none is (more are only counted): %s", RETRY_S, why)

    def _write(self, put: _Put) -> None:
        key, parent = put.chain.key, put.chain.parent
        if self._is_there(key):
            self._touch(key)
            self._count(known=1)
            return
        if parent is not None and not self._is_there(parent):  # nobody would find it, and others would go for it
            self._count(refused=1)
            return
        with self._folder.place(key, put.num_bytes, parent) as file:
            if file is None:
                self._count(refused=1)
                what = "a prefix of %s is not stored: %s bytes more, where %s are allowed and all that is there is what it builds on"
                self._warn("refused", what, key.hex(), f"{put.num_bytes:,}", f"{self.limit_bytes:,}")
                return
            kvfile.write(file, put.chain, put.parts)
        self._touch(key)
        self._count(written=1, written_bytes=put.num_bytes)

    def _is_there(self, key: bytes) -> bool:
        return os.access(self._folder.path(key), os.F_OK)

    def _is_paused(self) -> bool:
        return self._clock() < self._retry_at

    def _queued_bytes(self) -> int:
        return sum(put.num_bytes for put in self._queue.values())

    def _touch(self, key: bytes) -> None:
        now = int(self._clock() * 1e9)
        with suppress(OSError):  # it is gone again: then it needs no time
            os.utime(self._folder.path(key), ns=(now, now))

    def _count(self, **more: int) -> None:
        with self._changed:
            self._counts.update(more)

    def _warn(self, kind: str, message: str, *values: object) -> None:
        with self._changed:
            is_new = kind not in self._warned
            self._warned.add(kind)
        if is_new:
            log.warning(message, *values)
