"""From a name or a path to a running model: find the checkpoint, see its format, open it, fill a model with it."""

import json
from pathlib import Path

import torch

from herd.checkpoint import gguf, hf, meta, safefile, save
from herd.checkpoint.names import check_tensors, herd_shapes
from herd.checkpoint.source import TOKENIZER_FILES, Source, Stored, of_model
from herd.checkpoint.store import resolve
from herd.errors import CheckpointError, ModelNotFound
from herd.model.config import ModelConfig, from_dict
from herd.model.init import init_weights
from herd.model.llama4 import Llama4, build
from herd.model.presets import TINY
from herd.text.tokenizer import byte_tokenizer

_ACCEPTED = (
    "herd opens: a folder with herd.json; a folder with config.json and .safetensors (Hugging Face); a folder with params.json and "
    "consolidated.*.pth (Meta); a .gguf file"
)


def load_model(model: str | Path, *, dtype: torch.dtype | None = None, device: str = "cpu") -> tuple[Llama4, Source]:
    """A model with its weights, and the source they came from (its config and tokenizer files).

    model: a path or a short name ("cria", "tiny").  dtype: of the weights; by default float32 on a CPU, whose bfloat16 arithmetic is
    hundreds of times slower, and the checkpoint's own elsewhere. Weights that need no change are mapped, not copied.
    """
    source = open_model(model)
    if dtype is None:
        dtype = torch.float32 if torch.device(device).type == "cpu" else source.dtype
    return fill(source, dtype, device), source


def fill(source: Source, dtype: torch.dtype, device: str = "cpu") -> Llama4:
    """A model with the weights of a source, every parameter set exactly once."""
    model = build(source.config, dtype=dtype)
    tensors = {name: _materialize(stored, dtype, device) for name, stored in source.tensors.items()}
    model.load_state_dict(tensors, strict=True, assign=True)
    return model


def _materialize(stored: Stored, dtype: torch.dtype, device: str) -> torch.Tensor:
    if stored.view is not None and stored.dtype == dtype:
        return stored.view().to(device)
    out = torch.empty(stored.shape, dtype=dtype, device=device)
    for start, piece in stored.pieces():
        out[start : start + len(piece)] = piece.to(device)
    return out


def open_model(model: str | Path) -> Source:
    """The source that a name or a path stands for; "tiny" is `TINY` with random weights of seed 0 and a byte for a token."""
    if model == "tiny":
        return of_model(init_weights(build(TINY, device="cpu")), byte_tokenizer().files())
    return open_source(resolve(str(model)))


def open_source(path: Path) -> Source:
    """Open a checkpoint of any format. Raises `ModelNotFound` when nothing is there, `CheckpointError` when it is not one."""
    if not path.exists():
        raise ModelNotFound(f"{path} does not exist", _ACCEPTED)
    if path.is_file():
        with path.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
        if is_gguf:
            return gguf.read(path)
        raise CheckpointError(f"{path} is no checkpoint that herd knows", _ACCEPTED)
    for name, reader in ((save.CONFIG, read), (hf.CONFIG, hf.read), (meta.CONFIG, meta.read)):
        if (path / name).is_file():
            return reader(path)
    entries = sorted(entry.name for entry in path.iterdir())
    ggufs = [name for name in entries if name.endswith(".gguf")]
    if len(ggufs) == 1 or (ggufs and "-00001-of-" in ggufs[0]):
        return gguf.read(path / ggufs[0])
    if ggufs:
        raise CheckpointError(f"{path} holds {len(ggufs)} models: {', '.join(ggufs[:5])}", "give the path of one")
    if not entries:
        raise CheckpointError(f"{path} is an empty folder", _ACCEPTED)
    raise CheckpointError(f"{path} is no checkpoint that herd knows; it holds {', '.join(entries[:5])}", _ACCEPTED)


def read(folder: Path) -> Source:
    """Open a checkpoint in herd's own format."""
    path = folder / save.CONFIG
    try:
        facts = json.loads(path.read_text())
        if facts["format"] != "herd":
            raise ValueError(f"format {facts['format']!r}")
        version, values = facts["version"], dict(facts["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a herd config: {error!r}") from error
    if version != save.VERSION:
        raise CheckpointError(f"{path} has version {version}; this herd reads {save.VERSION}", "use a newer herd")
    try:
        config: ModelConfig = from_dict(ModelConfig, values)
    except TypeError as error:  # a fact is missing
        raise CheckpointError(f"{path} is not whole: {error}") from error
    regions, shapes = safefile.read_folder(folder), herd_shapes(config)
    check_tensors({name: region.shape for name, region in regions.items()}, shapes, str(folder))
    tensors = {name: regions[name].stored() for name in shapes}
    files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
    return Source(config=config, tensors=tensors, files=files, kind="herd")
