"""Keys and values of one chunk as a file: a checked header, then the tensors as they lie in memory.

    0    8 bytes   `herdkv` and the version, "01"
    8    8 bytes   n, the length of the JSON, little-endian
    16   16 bytes  blake2b of the first 16 bytes and the JSON
    32   n bytes   JSON: fingerprint; key and parent, hexadecimal; parts: name, dtype, shape, offset, crc32
    32 + n         the data, little-endian; 32 + n, and every part's offset from there, are multiples of 64

Nothing in a file is believed before its checksum fits: the header's before it is parsed, a part's before it is handed out. The file names
the store, the key and the version that it was written for, so a renamed or copied one is refused as well.

Files could be mapped (hence the alignment) and are read instead. A map shows what the disk says later, not what was checked; and where the
file was cut short or the disk fails, touching it is SIGBUS, which ends the process and every reply in it. Reading and checking 256 KiB at a
time is as fast as checking through a map where the bytes come from the disk, and 1.6 times slower where the system still has them.
"""

import json
import math
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from herd.checkpoint.safefile import bytes_of, write_all

VERSION = "01"

_MAGIC = b"herdkv" + VERSION.encode()
_HEAD_BYTES = 32  # before the JSON
_ALIGNMENT = 64
_MOST_HEADER = 16 << 20  # bytes of JSON
_BLOCK_BYTES = 256 << 10  # read or written, and checked, at a time
_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.int32)}


@dataclass(frozen=True, slots=True)
class Chain:
    """Whose chunk it is."""

    fingerprint: str  # of the store
    key: bytes
    parent: bytes | None  # key of the chunk before; None for a first one


def encode(chain: Chain, parts: Mapping[str, Tensor], crcs: Mapping[str, int]) -> tuple[bytes, dict[str, int]]:
    """All that comes before the data, and where in the file each part starts. It is as long whatever the checksums are."""
    entries: list[dict[str, Any]] = []
    offset = 0
    for name, tensor in parts.items():
        entries.append({"name": name, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)})
        assert entries[-1]["dtype"] in _DTYPES, tensor.dtype
        entries[-1] |= {"offset": offset, "crc32": f"{crcs.get(name, 0):08x}"}
        offset += tensor.nbytes + -tensor.nbytes % _ALIGNMENT
    parent = None if chain.parent is None else chain.parent.hex()
    fields = {"fingerprint": chain.fingerprint, "key": chain.key.hex(), "parent": parent, "parts": entries}
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-(_HEAD_BYTES + len(text)) % _ALIGNMENT)
    start = _MAGIC + len(text).to_bytes(8, "little")
    head = start + _digest(start, text) + text
    return head, {entry["name"]: len(head) + entry["offset"] for entry in entries}


def size(chain: Chain, parts: Mapping[str, Tensor]) -> int:
    """Bytes of the file."""
    head, offsets = encode(chain, parts, {})
    return max([len(head), *(offsets[name] + tensor.nbytes for name, tensor in parts.items())])


def write(file: FileIO, chain: Chain, parts: Mapping[str, Tensor]) -> None:
    """Fill a new file, and see it to the disk. The header comes last: until then the file is nothing."""
    _, offsets = encode(chain, parts, {})
    crcs: dict[str, int] = {}
    for name, tensor in parts.items():
        file.seek(offsets[name])
        data, crc = bytes_of(tensor.cpu()), 0
        for start in range(0, len(data), _BLOCK_BYTES):
            block = data[start : start + _BLOCK_BYTES]
            crc = zlib.crc32(block, crc)
            write_all(file.write, block)
        crcs[name] = crc
    file.seek(0)
    write_all(file.write, encode(chain, parts, crcs)[0])
    os.fsync(file.fileno())


def read(path: Path, fingerprint: str, key: bytes) -> dict[str, Tensor]:
    """The tensors, checked. Raises `ValueError` when the file is not what was written for that key, or `OSError`."""
    with path.open("rb", buffering=0) as file:
        chain, entries, first = _read_head(file)
        if (chain.fingerprint, chain.key) != (fingerprint, key):
            raise ValueError(f"it is chunk {chain.key.hex()} of {chain.fingerprint}")
        return {entry["name"]: _read_part(file, entry, first) for entry in entries}


def read_chain(path: Path) -> Chain:
    """Whose chunk a file is. Raises as `read` does."""
    with path.open("rb", buffering=0) as file:
        return _read_head(file)[0]


def _read_head(file: FileIO) -> tuple[Chain, list[dict[str, Any]], int]:
    """Its owner, its parts, and where the data starts."""
    start = _read_bytes(file, _HEAD_BYTES)
    length = int.from_bytes(start[8:16], "little")
    if start[:8] != _MAGIC or length > _MOST_HEADER:
        raise ValueError(f"it starts with {bytes(start[:16])!r}")
    text = _read_bytes(file, length)
    if _digest(start[:16], text) != start[16:]:
        raise ValueError("its header does not fit the checksum")
    fields = json.loads(text)
    parent = fields["parent"]
    chain = Chain(fields["fingerprint"], bytes.fromhex(fields["key"]), None if parent is None else bytes.fromhex(parent))
    return chain, fields["parts"], _HEAD_BYTES + length


def _read_part(file: FileIO, entry: dict[str, Any], first: int) -> Tensor:
    dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
    offset, num_bytes = first + entry["offset"], math.prod(shape) * dtype.itemsize
    if offset + num_bytes > os.fstat(file.fileno()).st_size:
        raise ValueError(f"it ends before {entry['name']} does")
    tensor = torch.empty(shape, dtype=dtype)
    data, crc = bytes_of(tensor), 0
    file.seek(offset)
    for start in range(0, num_bytes, _BLOCK_BYTES):
        block = data[start : start + _BLOCK_BYTES]
        _read_into(file, block)
        crc = zlib.crc32(block, crc)
    if f"{crc:08x}" != entry["crc32"]:
        raise ValueError(f"{entry['name']} does not fit its checksum")
    return tensor


def _read_bytes(file: FileIO, count: int) -> bytes:
    out = bytearray(count)
    _read_into(file, memoryview(out))
    return bytes(out)


def _read_into(file: FileIO, out: memoryview) -> None:
    while out:
        count = file.readinto(out)
        if not count:
            raise ValueError(f"it ends {len(out):,} bytes too early")
        out = out[count:]


def _digest(start: bytes, text: bytes) -> bytes:
    return blake2b(start + text, digest_size=16).digest()
