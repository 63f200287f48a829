"""herd's own format, written; and the way every format is written: beside its place, then renamed, or not at all.

A folder: `herd.json` (the facts of the model, as `ModelConfig` spells them), `model*.safetensors` under herd's names and in herd's
layout, and the tokenizer's files. A quantized matrix is there as its blocks, uint8, or its 8-bit floats, under its own name; 8-bit floats
have their scales, float32, beside them as NAME_scale. `herd.json` lists the kinds of blocks and numbers that there are, and no other is
accepted.
"""

import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from herd.checkpoint import safefile
from herd.checkpoint.source import Source, Stored
from herd.errors import ResourceError, UsageError

CONFIG = "herd.json"
VERSION = 1
SCALE = "_scale"  # added to the name of 8-bit floats for that of their scales


def write(source: Source, folder: Path, advance: Callable[[float], None], *, shard_bytes: int = safefile.SHARD_BYTES) -> None:
    """Write a source into an empty folder in herd's format. advance: told the bytes written."""
    facts = {"format": "herd", "version": VERSION, "config": dataclasses.asdict(source.config)}
    if kinds := sorted({stored.quantization for stored in source.tensors.values() if stored.kind or stored.float8}):
        facts["quantization"] = kinds
    (folder / CONFIG).write_text(json.dumps(facts, indent=2) + "\n")
    for name, content in source.files.items():
        (folder / name).write_bytes(content)
    tensors: dict[str, Stored] = {}
    for name, stored in source.tensors.items():
        if stored.float8 is not None:
            tensors |= {name: stored.float8.weight, name + SCALE: stored.float8.scale}
        else:
            tensors[name] = stored.blocks or stored
    safefile.write_folder(folder, tensors, advance, shard_bytes=shard_bytes)


@contextmanager
def staged(dst: Path, num_bytes: int, *, is_folder: bool = True) -> Iterator[Path]:
    """A temporary place beside `dst` to write to, renamed to it at the end; on any failure nothing stays, there or here.

    num_bytes: what will be written, checked against the free space first. Raises `UsageError` when dst is taken, `ResourceError` when
    the disk is or gets full.
    """
    if dst.exists() and not (is_folder and dst.is_dir() and not any(dst.iterdir())):
        raise UsageError(f"{dst} exists already", "name a new place; herd overwrites no checkpoint")
    dst.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(dst.parent).free
    if free < num_bytes:
        raise ResourceError(f"{dst} needs {num_bytes:,} bytes; {free:,} are free on its disk", "free some space or write elsewhere")
    dst = dst.absolute()  # "." has no name to add to
    partial = dst.with_name(f"{dst.name}.partial-{os.getpid()}")
    remove(partial)
    try:
        if is_folder:
            partial.mkdir()
        yield partial
        partial.replace(dst)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise ResourceError(f"the disk is full: {dst} needs {num_bytes:,} bytes", "free some space or write elsewhere") from error
    finally:
        remove(partial)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
