"""From a name or a path to a running model: find the checkpoint, see its format, open it, fill a model with it."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch

from herd.checkpoint import gguf, hf, meta, safefile, save
from herd.checkpoint.names import check_tensors, herd_shapes
from herd.checkpoint.rounding import read_float8
from herd.checkpoint.source import TOKENIZER_FILES, Region, Source, Stored, of_blocks, of_model
from herd.checkpoint.store import resolve
from herd.errors import CheckpointError, HerdError, ModelNotFound
from herd.log import log
from herd.model.config import ModelConfig, from_dict
from herd.model.init import init_weights
from herd.model.llama4 import Llama4, build
from herd.model.presets import TINY
from herd.model.swap import hold_blocks
from herd.ops import pick
from herd.ops.fp8 import FP8
from herd.ops.int4 import KINDS
from herd.quant.int4 import part_of
from herd.text.tokenizer import byte_tokenizer

_ACCEPTED = (
    "herd opens: a folder with herd.json; a folder with config.json and .safetensors (Hugging Face); a folder with params.json and "
    "consolidated.*.pth (Meta); a .gguf file"
)


def load_model(
    model: str | Path, *, dtype: torch.dtype | None = None, device: str = "cpu", activation_bits: int = 0
) -> tuple[Llama4, Source]:
    """A model with its weights, and the source they came from (its config and tokenizer files).

    model: a path or a short name ("cria", "tiny").  dtype: of the weights; by default float32 on a CPU, whose bfloat16 arithmetic is
    hundreds of times slower, and elsewhere the checkpoint's own, bfloat16 if that is blocks. Weights that need no change are mapped, not
    copied. Blocks of 4 and 8 bits stay blocks where something computes with them (`herd inspect --ops`), and on a CPU other quantizations
    (GGUF's K-quants, fp8) become blocks near them, with a warning, unless a dtype is asked for; else they are dequantized.
    activation_bits: what blocks are multiplied with, see `hold_blocks`.
    """
    source = open_model(model)
    kind = torch.device(device).type
    has_blocks = any(stored.blocks is not None for stored in source.tensors.values())
    own = torch.float32 if kind == "cpu" else torch.bfloat16 if has_blocks else source.dtype
    stay = dtype is None and pick.holds_blocks(kind, own)
    return fill(source, dtype or own, device, holds_blocks=stay, activation_bits=activation_bits), source


def fill(source: Source, dtype: torch.dtype, device: str = "cpu", *, holds_blocks: bool = False, activation_bits: int = 0) -> Llama4:
    """A model with the weights of a source, every parameter set exactly once. holds_blocks: quantized matrices are, or become, blocks."""
    model = build(source.config, dtype=dtype)
    blocks = {name: tensor.to(device) for name, tensor in _blocks(source).items()} if holds_blocks else {}
    hold_blocks(model, blocks, activation_bits)
    tensors = {name: blocks[name] if name in blocks else _materialize(stored, dtype, device) for name, stored in source.tensors.items()}
    model.load_state_dict(tensors, strict=True, assign=True)
    return model


def _blocks(source: Source) -> dict[str, torch.Tensor]:
    """The blocks of every matrix that has some, or has some near it; of a group of experts all three or none."""
    found: dict[str, Stored] = {}
    for name, stored in source.tensors.items():
        blocks = stored.blocks or (stored.near if part_of(name) else None)
        if blocks is not None:
            found[name] = blocks
    for name in [name for name in found if ".experts." in name]:
        group = name.rpartition(".")[0]
        if not all(f"{group}.{part}" in found for part in ("gate", "up", "down")):
            del found[name]
    _warn_of_rounding(source, found)
    return {name: blocks.view() if blocks.view is not None else _whole(blocks) for name, blocks in found.items()}


def _warn_of_rounding(source: Source, blocks: Mapping[str, Stored]) -> None:
    """One line on what the matrices become that herd has no kernels for."""
    pairs = [(source.tensors[name].rounded, str(KINDS[b.shape[-1]])) for name, b in blocks.items() if source.tensors[name].rounded]
    if pairs:
        what = ", ".join(f"{count} in {before} as {kind}" for (before, kind), count in sorted(Counter(pairs).items()))
        log.warning(
            "no kernels run these matrices as they are, so they are rounded once more while loading: %s. "
            "dtype=torch.float32 loads them exactly, `herd quantize` does it once for good",
            what,
        )


def _whole(stored: Stored) -> torch.Tensor:
    """A tensor read piece by piece, so that what it is made from is never there as a whole."""
    out = torch.empty(stored.shape, dtype=stored.dtype)
    for start, piece in stored.pieces():
        out[start : start + len(piece)] = piece
    return out


def _materialize(stored: Stored, dtype: torch.dtype, device: str) -> torch.Tensor:
    """A weight as plain numbers."""
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
    try:
        return _open(path)
    except CheckpointError as error:
        if path.name in error.message:
            raise
        raise CheckpointError(f"{path}: {error.message}", error.hint) from error
    except HerdError:
        raise
    except Exception as error:  # readers say what is wrong where they can; a broken file may make them stumble over anything
        raise CheckpointError(
            f"{path} is broken, or no checkpoint after all: {type(error).__name__}: {error!s:.200}", "fetch it again, or make it anew"
        ) from error


def _open(path: Path) -> Source:
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
        version, values, kinds = facts["version"], dict(facts["config"]), list(facts.get("quantization", []))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a herd config: {error!r}") from error
    if version != save.VERSION:
        raise CheckpointError(f"{path} has version {version}; this herd reads {save.VERSION}", "use a newer herd")
    try:
        config: ModelConfig = from_dict(ModelConfig, values)
    except TypeError as error:  # a fact is missing
        raise CheckpointError(f"{path} is not whole: {error}") from error
    shapes = herd_shapes(config)
    regions = safefile.read_folder(folder)
    scales = {name: regions.pop(name + save.SCALE) for name in list(regions) if name + save.SCALE in regions}
    tensors = {name: _stored(name, region, scales.get(name), kinds, path) for name, region in regions.items()}
    check_tensors({name: stored.shape for name, stored in tensors.items()}, shapes, str(folder))
    tensors = {name: tensors[name] for name in shapes}
    files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
    return Source(config=config, tensors=tensors, files=files, kind="herd")


def _stored(name: str, region: Region, scale: Region | None, kinds: list[str], path: Path) -> Stored:
    """A tensor of herd's format. Blocks are uint8, and their last dim tells the kind, which must be one that herd.json lists."""
    if region.dtype == FP8 or scale is not None:
        if scale is None or region.dtype != FP8 or "float8" not in kinds:
            has = "no scales" if scale is None else "scales"
            raise CheckpointError(
                f"{name} is {region.dtype} with {has}; {path} lists {', '.join(map(str, kinds)) or 'none'}",
                "8-bit floats have scales and are listed as float8; the files are not of one checkpoint",
            )
        return read_float8(name, region, scale)
    if region.dtype != torch.uint8:
        return region.stored()
    kind = KINDS.get(region.shape[-1]) if len(region.shape) in (3, 4) else None
    if kind is None or str(kind) not in kinds:
        what = f"blocks of {kind}" if kind else "no blocks that herd knows"
        raise CheckpointError(
            f"{name} is uint8 {list(region.shape)}, {what}; {path} lists {', '.join(map(str, kinds)) or 'none'}",
            "the config does not fit the weights, or a newer herd wrote them",
        )
    return of_blocks(region.stored())
