"""Memory that lies in a file, so that there may be more of it than the machine has.

The file is made here and has no name, so nobody can cut it short under the map, and a process that is killed leaves nothing behind. All its
room is taken from the disk at once: a disk that is full is an error at the start, where later it would be a SIGBUS, which ends the process
and every reply in it. What is left of that is a disk that fails.
"""

import errno
import mmap
import os
import sys
import tempfile
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from herd.errors import ResourceError, UsageError


class MappedFile:
    """So many bytes, handed out as tensors. Their contents last as long as the process."""

    def __init__(self, folder: Path, num_bytes: int) -> None:
        """folder: is made where it is not there; its disk is the one that is used. Raises `UsageError` or `ResourceError`."""
        if sys.platform != "linux":
            raise UsageError("kv_folder works on Linux only", "leave it out", param="kv_folder")
        self.num_bytes = num_bytes
        self._used = 0
        try:
            self._map = _mapped(folder, num_bytes)
        except OSError as error:
            wanted = f"{num_bytes / 2**30:.3g} GiB"
            if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
                raise ResourceError(
                    f"there is no room for {wanted} of keys and values in {folder}: {error.strerror}",
                    "lower kv_disk_gib or context_tokens, or name a kv_folder on a larger disk",
                    param="kv_disk_gib",
                ) from error
            raise ResourceError(f"kv_folder {folder} cannot hold a file of {wanted}: {error.strerror}", param="kv_folder") from error
        self._map.madvise(mmap.MADV_RANDOM)  # no reading ahead in large pieces, which are mapped as a whole: see window.inl
        whole = torch.frombuffer(self._map, dtype=torch.uint8)
        self.address = whole.data_ptr()

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The next of its bytes, zeros until they are written."""
        start = self._used
        self._used += padded(prod(shape) * dtype.itemsize)
        assert self._used <= self.num_bytes
        return torch.frombuffer(self._map, dtype=dtype, count=prod(shape), offset=start).view(shape)

    def let_go(self) -> None:
        """Take all of it out of this process's memory. Nothing is lost: what is touched again comes back from the system or the disk."""
        self._map.madvise(mmap.MADV_DONTNEED)


def padded(num_bytes: int) -> int:
    """What a tensor takes in a file: whole pages of the system."""
    return -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


def _mapped(folder: Path, num_bytes: int) -> mmap.mmap:
    """Raises `OSError`."""
    folder.mkdir(parents=True, exist_ok=True)
    space = os.statvfs(folder)
    if space.f_bavail * space.f_frsize < num_bytes:  # said before the disk is filled to its brim to find it out
        raise OSError(errno.ENOSPC, f"{space.f_bavail * space.f_frsize / 2**30:.3g} GiB are free")
    with tempfile.TemporaryFile(dir=folder) as file:  # O_TMPFILE: it never has a name, where the filesystem can do that
        os.posix_fallocate(file.fileno(), 0, num_bytes)
        return mmap.mmap(file.fileno(), num_bytes)
