"""A folder of stored chunks that several processes share: what is in it, whose turn it is to go, and who may say so.

    FOLDER/lock                                  held by whoever makes room or gives a file its name, while he does
    FOLDER/<fingerprint>/<key>.kv                one chunk; its time of change is when it was last used
    FOLDER/<fingerprint>/<key>.<random>.partial  one being written, of its final size from the start, and locked by its writer

The limit counts every fingerprint's files, so those of a model that is gone make room for those of the one that is here. What is named
otherwise is not herd's, and stays. A partial file whose lock is free belongs to a writer that died, and is removed when room is next made.

A chunk is of use only after all chunks before it. So the first to go are those whose beginning is gone (it may come back, when it is
computed anew), then those that no other continues, the least recently used first.

Nothing is remembered of the folder but what cannot change, so nothing can be out of date.
"""

import errno
import fcntl
import heapq
import os
import re
import secrets
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from herd.engine import kvfile

_FINGERPRINT = re.compile(r"[0-9a-f]{32}")
_NAME = re.compile(r"([0-9a-f]{2,128})(\.kv|\.[0-9a-f]{8}\.partial)")


@dataclass(frozen=True, slots=True)
class Entry:
    """A file in the folder."""

    path: Path
    num_bytes: int
    used: int  # ns
    is_whole: bool


class KvFolder:
    """The chunks of all models, seen by one of them."""

    def __init__(self, folder: Path, fingerprint: str, limit_bytes: int) -> None:
        """Raises `OSError` where herd may not write."""
        assert _FINGERPRINT.fullmatch(fingerprint), fingerprint
        self.folder, self.own, self.limit_bytes = folder.absolute(), folder.absolute() / fingerprint, limit_bytes
        self.num_entries = self.num_bytes = 0  # of all models, when room was last made
        self.num_evicted = 0  # by this process
        self._parents: dict[Path, Path | None] = {}  # of files seen; a key says all that came before it, so they never change
        with self._locked():
            self._make_room(0, None)
        if not os.access(self.own, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), self.own)

    def path(self, key: bytes) -> Path:
        assert 0 < len(key) <= 64
        return self.own / f"{key.hex()}.kv"

    @contextmanager
    def place(self, key: bytes, num_bytes: int, parent: bytes | None) -> Iterator[FileIO | None]:
        """A file to write a chunk to, which appears whole under its name at the end, or not at all; None where there is no room for it.

        parent: the chunk that it continues; neither that one nor those before it go for it.
        """
        partial = self.own / f"{key.hex()}.{secrets.token_hex(4)}.partial"
        with self._locked():
            file = self._create(partial, num_bytes) if self._make_room(num_bytes, parent) else None
        if file is None:
            yield None
            return
        with file:
            try:
                yield file
                with self._locked():  # who counts must not miss it between its two names
                    partial.replace(self.path(key))
            finally:
                partial.unlink(missing_ok=True)
        _sync(self.own)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the folder, made anew where it is gone."""
        self.own.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (self.folder / "lock").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _create(self, partial: Path, num_bytes: int) -> FileIO:
        """A partial file, to be made while the folder is held: nobody may find it without its lock."""
        file = FileIO(partial, "x", opener=lambda path, flags: os.open(path, flags, 0o600))  # what people wrote is in there
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.truncate(num_bytes)
        except OSError:
            partial.unlink()
            file.close()
            raise
        return file

    def _make_room(self, num_bytes: int, parent: bytes | None) -> bool:
        """Remove chunks until so many bytes more are within the limit; False, with nothing removed, where that cannot be."""
        entries = {entry.path: entry for entry in self._scan()}
        excess = sum(entry.num_bytes for entry in entries.values()) + num_bytes - self.limit_bytes
        victims: list[Entry] = []
        gained = 0
        if excess > 0:
            kept = None if parent is None else self.path(parent)
            order = self._order({path: entry for path, entry in entries.items() if entry.is_whole}, kept)
            while gained < excess and (victim := next(order, None)):
                victims.append(victim)
                gained += victim.num_bytes
        for victim in victims if gained >= excess else ():
            victim.path.unlink(missing_ok=True)
            del entries[victim.path]
            self.num_evicted += 1
        self.num_entries = sum(entry.is_whole for entry in entries.values())
        self.num_bytes = sum(entry.num_bytes for entry in entries.values())
        return gained >= excess

    def _order(self, entries: Mapping[Path, Entry], kept: Path | None) -> Iterator[Entry]:
        """Chunks in the order in which they go; `kept` and those before it never do."""
        parents = self._parents = {path: self._parents[path] if path in self._parents else _parent(path) for path in entries}
        num_children = Counter(parents.values())
        num_children[kept] += 1

        def rank(path: Path) -> tuple[bool, int, Path]:
            before = parents[path]
            for _ in entries:  # a chain has no more steps than that; damage must not make this endless
                if before is None or before not in entries:
                    break
                before = parents[before]
            return before is None, entries[path].used, path

        leaves = [rank(path) for path in entries if not num_children[path]]
        heapq.heapify(leaves)
        while leaves:
            path = heapq.heappop(leaves)[-1]
            yield entries[path]
            before = parents[path]
            num_children[before] -= 1
            if before is not None and before in entries and not num_children[before]:
                heapq.heappush(leaves, rank(before))

    def _scan(self) -> Iterator[Entry]:
        """Every file of every model, without what dead writers left, which is removed."""
        for folder in self.folder.iterdir():
            if not (_FINGERPRINT.fullmatch(folder.name) and folder.is_dir()):
                continue
            for path in folder.iterdir():
                name = _NAME.fullmatch(path.name)
                with suppress(FileNotFoundError):  # its writer is done, or a reader found it broken
                    found = path.lstat()
                    is_whole = name is not None and name[2] == ".kv"
                    if name and stat.S_ISREG(found.st_mode) and (is_whole or not _remove_if_dead(path)):
                        yield Entry(path, found.st_size, found.st_mtime_ns, is_whole)


def _parent(path: Path) -> Path | None:
    """The file of the chunk before; a name that no file has where this one cannot say."""
    try:
        parent = kvfile.read_chain(path).parent
    except (ValueError, OSError):
        return path.with_suffix(".unknown")
    return None if parent is None else path.with_name(f"{parent.hex()}.kv")


def _remove_if_dead(partial: Path) -> bool:
    with partial.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        partial.unlink()
        return True


def _sync(folder: Path) -> None:
    """See a folder's names to the disk, where the filesystem can: else the power may take a new file with it, and no other."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
