"""Which weights these are, told without reading them all: what is computed from them may be kept, and must not meet others.

Files are known by size, time of change, and a sample of their bytes; their names and places do not count, so a checkpoint may be moved.
One that was fetched again is another (its times are), which costs what was kept and is never wrong. Weights that only exist in memory are
read whole.
"""

from hashlib import blake2b, sha256
from pathlib import Path

from herd.checkpoint.safefile import bytes_of
from herd.checkpoint.source import Source
from herd.checkpoint.store import resolve
from herd.errors import CheckpointError

_SUFFIXES = {".safetensors", ".pth", ".gguf"}
_CONFIGS = {"herd.json", "config.json", "params.json"}
_SAMPLES = 32  # of a file, evenly from its first byte to its last
_SAMPLE_BYTES = 4096


def weights_identity(model: str | Path, source: Source) -> str:
    """Of a model's weights, 32 hexadecimal digits. model: the name or path that `source` was opened from."""
    return identity_in_memory(source) if source.kind == "memory" else identity_of_files(resolve(str(model)))


def identity_of_files(path: Path) -> str:
    """Of a checkpoint on the disk: a folder, or a GGUF file (with all its parts). Raises `CheckpointError` when it holds no weights."""
    if path.is_file():
        stem, is_part, _ = path.name.partition("-00001-of-")
        files = sorted(path.parent.glob(f"{stem}-*-of-*.gguf")) if is_part else [path]
    else:
        files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES or file.name in _CONFIGS)
    if not any(file.suffix in _SUFFIXES for file in files):
        raise CheckpointError(f"{path} holds no weights", "give the path of a checkpoint")
    found = blake2b(digest_size=16)
    for file in files:
        about = file.stat()
        found.update(f"{about.st_size} {about.st_mtime_ns}\n".encode())
        with file.open("rb", buffering=0) as data:
            for i in range(_SAMPLES):
                data.seek(max(0, about.st_size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
                found.update(data.read(_SAMPLE_BYTES))
    return found.hexdigest()


def identity_in_memory(source: Source) -> str:
    """Of all tensors, bit for bit."""
    found = sha256()  # faster than blake2b where the processor knows it
    for name, stored in sorted(source.tensors.items()):
        found.update(f"{name} {stored.dtype} {list(stored.shape)}\n".encode())
        found.update(bytes_of(stored.read()))
    return found.hexdigest()[:32]
