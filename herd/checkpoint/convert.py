"""One checkpoint format into another, streaming: no more than a few pieces of tensors are in memory at any time.

Peak memory stays under twice the largest tensor plus 1 GB, so a laptop converts the 400B model; `tests/checkpoint/test_memory.py` measures.
"""

from pathlib import Path

import torch

from herd.checkpoint import compressed, gguf, hf, meta, save
from herd.checkpoint.load import open_model
from herd.checkpoint.safefile import SHARD_BYTES
from herd.checkpoint.save import staged
from herd.checkpoint.source import Source, Stored
from herd.errors import UsageError, nearest
from herd.log import log, progress

FORMATS = ("herd", "hf", "meta", "gguf")


def convert(src: str | Path, dst: Path, to: str, *, dtype: torch.dtype | None = None) -> None:
    """Read the checkpoint at a path or of a short name, whatever its format, and write it to `dst` in the format `to`; see `write`."""
    write(open_model(src), dst, to, dtype=dtype)


def write(
    source: Source,
    dst: Path,
    to: str,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    num_shards: int = meta.NUM_SHARDS,
) -> None:
    """Write a source to `dst`, a folder (a file for gguf) that is not there yet; on any failure nothing is left there.

    dtype: of the weights as plain numbers; if None as they are, quantized ones by their codes where `to` has a place for those.
    shard_bytes: most of one safetensors file (herd, hf).  num_shards: files (meta).
    Raises `UsageError` when dst is taken, `CheckpointError` when the format cannot hold the model, `ResourceError` when the disk is full.
    """
    if to not in FORMATS:
        raise UsageError(f"no checkpoint format is called {to!r}", nearest(to, FORMATS) or f"there are: {', '.join(FORMATS)}")
    if dtype is not None:
        source = source.to(dtype)
    _warn_of_floats(to, source)
    num_bytes = sum(stored.packed_bytes if _keeps(to, stored) else stored.num_bytes for stored in source.tensors.values())
    with staged(dst, num_bytes, is_folder=to != "gguf") as partial, progress(f"writing {dst.name}", num_bytes) as bar:
        if to == "herd":
            save.write(source, partial, bar.advance, shard_bytes=shard_bytes)
        elif to == "hf":
            hf.write(source, partial, bar.advance, shard_bytes=shard_bytes)
        elif to == "meta":
            meta.write(source, partial, bar.advance, num_shards=num_shards)
        else:
            gguf.write(source, partial, bar.advance)


def _keeps(to: str, stored: Stored) -> bool:
    """Whether a format has a place for a tensor's blocks or 8-bit floats."""
    if to == "herd":
        return stored.kind is not None or stored.float8 is not None
    return (to == "gguf" and stored.kind is not None) or (to == "hf" and compressed.is_writable(stored))


def _warn_of_floats(to: str, source: Source) -> None:
    """One line on quantized matrices that lose their codes, which loses no value but takes much room."""
    if lost := sorted({stored.quantization for stored in source.tensors.values() if stored.quantization and not _keeps(to, stored)}):
        log.warning("the format %s has no place for the codes of %s: such matrices are written as float32", to, ", ".join(lost))
