"""From a checkpoint to an engine that is not running yet."""

from pathlib import Path

import torch

from herd.checkpoint.identity import weights_identity
from herd.checkpoint.load import load_model
from herd.checkpoint.source import Source
from herd.engine.config import EngineConfig
from herd.engine.disk import DiskStore, fingerprint
from herd.engine.engine import Engine
from herd.engine.memory import hand_back
from herd.engine.pages import kept_dtype
from herd.engine.trace import TraceFile
from herd.log import log
from herd.model.llama4 import Llama4
from herd.model.swap import activation_bits
from herd.ops.native import kernels
from herd.text.tokenizer import tokenizer_of


def short_name(name: str | Path) -> str:
    """What a model is called by its clients: its short name, or the last part of its path."""
    path = Path(name).resolve()
    return path.stem if path.suffix == ".gguf" else path.name


def open_engine(
    name: str | Path,
    *,
    config: EngineConfig,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    trace: TraceFile | None = None,
) -> Engine:
    """The engine of a model, not yet running: for who wants to step it himself. Arguments and errors as for `herd.load`."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, source = load_model(name, dtype=dtype, device=device, activation_bits=config.activation_bits)
    tokenizer = tokenizer_of(source.files)
    hand_back()  # parsing a vocabulary leaves tens of megabytes of holes
    if config.kv_folder is not None and not model.config.global_layers:
        log.warning("kv_folder is of no use: %s has no global layers, whose pages it is for", short_name(name))
    engine = Engine(model, tokenizer, config, _store(name, model, source, config))
    engine.trace = trace.engine(short_name(name)) if trace else None
    return engine


def _store(name: str | Path, model: Llama4, source: Source, config: EngineConfig) -> DiskStore | None:
    """Where the engine keeps finished chunks over restarts, if its user has named a folder and the model has such."""
    if config.prefix_folder is None:
        return None
    if not model.config.global_layers or not model.config.chunk_tokens:
        log.warning("prefix_folder is of no use: %s has no layers whose keys outlast a chunk", short_name(name))
        return None
    dtype = model.norm.weight.dtype
    road = "native" if kernels() is not None and dtype == torch.float32 else "plain"
    computation = f"{dtype}, activations of {activation_bits(model)} bits, {road}"
    kept = str(kept_dtype(config, model))
    mark = fingerprint(model.config, weights_identity(name, source), kept, config.page_tokens, computation)
    return DiskStore(config.prefix_folder, mark, int(config.prefix_gib * 2**30))
