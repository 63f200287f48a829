"""Safetensors files, read in place and written as a stream. Source: the format's description in the `safetensors` project.

A file is 8 bytes of length, that many bytes of JSON (name -> dtype, shape, first and last byte), then the data. The library reads it
well, but it writes from whole tensors only; a stream needs the header first and the data piece by piece.
"""

import json
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from herd.checkpoint.source import Region, Stored
from herd.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MOST_HEADER = 100_000_000  # bytes; the library's own limit
_ALIGNMENT = 64  # bytes that the data starts at a multiple of: kernels read a mapped file, and a vector across two cache lines costs two
_AGAIN = "fetch the file again"


def read_folder(folder: Path) -> dict[str, Region]:
    """Every tensor of a checkpoint folder: of the files in its index, or else of all `*.safetensors`."""
    index = folder / INDEX
    if index.is_file():
        try:
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is not a safetensors index: {error!r}", _AGAIN) from error
        absent = [name for name in files if not (folder / name).is_file()]
        if absent:
            raise CheckpointError(f"{folder} lacks {len(absent)} of {len(files)} weight files: {', '.join(absent[:3])}", "fetch them")
        paths = [folder / name for name in files]
    else:
        paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise CheckpointError(f"{folder} holds no .safetensors file", "a checkpoint is its config and its weights; fetch both")
    found: dict[str, Region] = {}
    for path in paths:
        for name, region in read_header(path).items():
            if name in found:
                raise CheckpointError(f"tensor {name} is in {found[name].path.name} and in {path.name}", "keep one set of weights there")
            found[name] = region
    return found


def read_header(path: Path) -> dict[str, Region]:
    """Name -> place of every tensor in a file. Raises `CheckpointError` unless the file is exactly as long as its header says."""
    actual = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if actual < 8 or length > min(_MOST_HEADER, actual - 8):
            raise CheckpointError(f"{path} is no safetensors file, or its header of {length:,} bytes is cut ({actual:,} in all)", _AGAIN)
        try:
            header: dict[str, dict[str, Any]] = json.loads(file.read(length))
            header.pop("__metadata__", None)
            found = {name: _region(path, 8 + length, entry) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} has a broken header: {error!r}", _AGAIN) from error
    _refuse_overlaps(path, found)
    expected = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if actual != expected:
        raise CheckpointError(f"{path} has {actual:,} bytes; its header says {expected:,}", _AGAIN)
    return found


def _refuse_overlaps(path: Path, regions: dict[str, Region]) -> None:
    """Two tensors over the same bytes are never meant: the library refuses them too, and writes shared ones once."""
    held = sorted((region.offset, region.offset + region.num_bytes, name) for name, region in regions.items() if region.num_bytes)
    for (_, stop, name), (start, _, after) in pairwise(held):
        if start < stop:
            raise CheckpointError(f"{path}: tensors {name} and {after} lie over each other, by {stop - start:,} bytes", _AGAIN)


def _region(path: Path, base: int, entry: dict[str, Any]) -> Region:
    if entry["dtype"] not in _DTYPES:
        raise CheckpointError(f"{path} holds a tensor of dtype {entry['dtype']}", f"herd reads {', '.join(_DTYPES)}")
    region = Region(path, base + entry["data_offsets"][0], tuple(entry["shape"]), _DTYPES[entry["dtype"]])
    if entry["data_offsets"][1] - entry["data_offsets"][0] != region.num_bytes or entry["data_offsets"][0] < 0:
        raise ValueError(f"offsets {entry['data_offsets']} for a {entry['dtype']} of shape {entry['shape']}")
    return region


def write_folder(folder: Path, tensors: Mapping[str, Stored], advance: Callable[[float], None], *, shard_bytes: int = SHARD_BYTES) -> None:
    """Stream tensors into `model.safetensors`, or into shards of at most `shard_bytes` (a larger tensor has one alone) and their index."""
    shards: list[dict[str, Stored]] = [{}]
    for name, stored in tensors.items():
        if shards[-1] and sum(s.num_bytes for s in shards[-1].values()) + stored.num_bytes > shard_bytes:
            shards.append({})
        shards[-1][name] = stored
    if len(shards) == 1:
        _write(folder / "model.safetensors", shards[0], advance)
        return
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        path = folder / f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        _write(path, shard, advance)
        weight_map.update(dict.fromkeys(shard, path.name))
    total = sum(stored.num_bytes for stored in tensors.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n")


def _write(path: Path, tensors: Mapping[str, Stored], advance: Callable[[float], None]) -> None:
    # Wide dtypes first, as the library does: so every tensor starts at a multiple of its item size.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, stored in ordered:
        entry = {"dtype": _NAMES[stored.dtype], "shape": list(stored.shape), "data_offsets": [offset, offset + stored.num_bytes]}
        header[name] = entry
        offset += stored.num_bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-(8 + len(encoded)) % _ALIGNMENT)
    with path.open("wb", buffering=0) as file:
        write_all(file.write, len(encoded).to_bytes(8, "little") + encoded)
        for _, stored in ordered:
            for _, piece in stored.pieces():
                write_all(file.write, bytes_of(piece))
                advance(piece.nbytes)


def bytes_of(piece: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor, without a copy."""
    return memoryview(piece.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def write_all(write: Callable[[Any], int | None], data: bytes | memoryview) -> None:
    """Write every byte: one call may take less than it is given (2 GB at most on Linux)."""
    rest = memoryview(data)
    while rest:
        rest = rest[write(rest) or 0 :]
