"""Meta's format: params.json and consolidated.00.pth ... one file per tensor-parallel shard; released Llama 4 has eight.

`meta_shards.py` says how the shards make a whole, `meta_quantized.py` what their own fp8 and int4 files add. Written is without codes:
`torch.save` lays out the file without data, then every piece goes to its place, in all shards at once.
Source: llama_models, llama4/args.py, model.py and moe.py (widths).
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from herd.checkpoint import meta_quantized
from herd.checkpoint.meta_shards import Part, parts_of, regions_of, shard_shape
from herd.checkpoint.names import FileTensor, check_tensors, file_tensors, herd_shapes
from herd.checkpoint.safefile import bytes_of, write_all
from herd.checkpoint.source import TOKENIZER_FILES, Region, Source, Stored, chat_format, check_expressible, mend_rope
from herd.errors import CheckpointError
from herd.log import log
from herd.model.config import ModelConfig, RopeScaling, VisionConfig

CONFIG = "params.json"
NUM_SHARDS = 8


# --- reading


def read(folder: Path) -> Source:
    """Open a checkpoint folder of any number of shards. Raises `CheckpointError`; runs no code from the files."""
    where = str(folder / CONFIG)
    try:
        params = dict(json.loads((folder / CONFIG).read_text()))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{where} is not JSON: {error}", "fetch the file again") from error
    files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
    config = mend_rope(read_params(params, files, where), where)
    paths = sorted(folder.glob("consolidated.*.pth"))
    if [path.name for path in paths] != [_shard_name(i) for i in range(len(paths))] or not paths:
        names = ", ".join(path.name for path in paths) or "none"
        raise CheckpointError(f"{folder}: the shards are not consolidated.00.pth and on without a gap: {names}", "fetch the missing ones")
    shapes = herd_shapes(config)
    wanted = file_tensors(config, "meta")
    _check_shards(config, wanted, shapes, len(paths), where)
    scales = meta_quantized.find_scales(folder, len(paths), wanted, shapes)
    shards = [regions_of(path) for path in paths]
    expected = {n: scales.local_shape(n, shard_shape(t, shapes, len(paths)), t.turned) for n, t in wanted.items()}
    for path, regions in zip(paths, shards, strict=True):
        check_tensors({n: r.shape for n, r in regions.items()}, expected, str(path))
    tensors: dict[str, Stored] = {}
    for name, t in wanted.items():
        for herd, part in parts_of(t, shapes, len(paths)).items():
            tensors[herd] = scales.stored(name, part, [regions[name] for regions in shards])
    return Source(config=config, tensors={name: tensors[name] for name in shapes}, files=files, kind="meta")


def _shard_name(index: int) -> str:
    return f"consolidated.{index:02d}.pth"


def _check_shards(
    config: ModelConfig, wanted: Mapping[str, FileTensor], shapes: Mapping[str, tuple[int, ...]], num_shards: int, where: str
) -> None:
    """Every cut dim must divide by the number of shards, and a head must not be cut."""
    heads = {"query heads": config.num_heads, "key/value heads": config.num_kv_heads}
    if config.vision:
        heads["vision heads"] = config.vision.num_heads
    for what, count in heads.items():
        if count % num_shards:
            raise CheckpointError(f"{where}: {count} {what} do not divide into {num_shards} shards", "use fewer shards")
    for t in wanted.values():
        for herd in t.herd:
            if t.split is not None and shapes[herd][t.split] % num_shards:
                raise CheckpointError(f"{where}: {herd} {list(shapes[herd])} does not divide into {num_shards} shards", "use fewer shards")


# --- writing


def write(source: Source, folder: Path, advance: Callable[[float], None], *, num_shards: int = NUM_SHARDS) -> None:
    """Write a source into an empty folder as `num_shards` shards. Raises `CheckpointError` for a model that does not fit."""
    config = source.config
    params = write_params(config)
    check_expressible(config, read_params(params, source.files, CONFIG), CONFIG)
    shapes = herd_shapes(config)
    wanted = file_tensors(config, "meta")
    _check_shards(config, wanted, shapes, num_shards, CONFIG)
    (folder / CONFIG).write_text(json.dumps(params, indent=2) + "\n")
    for name, content in source.files.items():
        (folder / name).write_bytes(content)
    layout = {name: (shard_shape(t, shapes, num_shards), source.tensors[t.herd[0]].dtype) for name, t in wanted.items()}
    if config.tied:  # Meta has no tied models: the embedding is written twice
        layout["output.weight"] = layout["tok_embeddings.weight"]
    paths = [folder / _shard_name(i) for i in range(num_shards)]
    for path in paths:
        _lay_out(path, layout)
    shards = [regions_of(path) for path in paths]
    for name, t in wanted.items():
        parts = parts_of(t, shapes, num_shards)
        for herd, part in parts.items():
            _write_part(source.tensors[herd], part, [regions[name] for regions in shards], advance)
            if config.tied and herd == "embed.weight":
                _write_part(source.tensors[herd], part, [regions["output.weight"] for regions in shards], advance)


def _lay_out(path: Path, layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
    """A .pth file with every tensor in its place and no data."""
    with FakeTensorMode():
        state = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in layout.items()}
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(state, path)


def _write_part(stored: Stored, part: Part, regions: list[Region], advance: Callable[[float], None]) -> None:
    files = [region.path.open("r+b", buffering=0) for region in regions]
    try:
        pieces = [(0, stored.read())] if part.turned and len(part.shape) == 2 else stored.pieces()
        for start, piece in pieces:
            for i, row, rows in part.cut(piece, start):
                row_bytes = math.prod(regions[i].shape[1:]) * rows.dtype.itemsize
                files[i].seek(regions[i].offset + row * row_bytes)
                write_all(files[i].write, bytes_of(rows))
            advance(piece.nbytes)
    finally:
        for file in files:
            file.close()


# --- params.json


_PARAMS = {
    "width": "dim",
    "num_layers": "n_layers",
    "num_heads": "n_heads",
    "num_kv_heads": "n_kv_heads",
    "head_width": "head_dim",
    "vocab_size": "vocab_size",
    "norm_eps": "norm_eps",
    "rope_theta": "rope_theta",
    "global_step": "nope_layer_interval",
    "qk_norm": "use_qk_norm",
    "temperature_tuning": "attn_temperature_tuning",
    "temperature_scale": "attn_scale",
    "chunk_tokens": "attention_chunk_size",
}
_DEFAULTS: dict[str, Any] = {  # Source: llama_models/llama4/args.py, ModelArgs
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "nope_layer_interval": None,
    "use_qk_norm": False,
    "attn_temperature_tuning": False,
    "attn_scale": 0.1,
    "attention_chunk_size": None,
}
_OTHER = {
    *("multiple_of", "ffn_dim_multiplier", "ffn_exp", "use_scaled_rope", "rope_scaling_factor", "rope_high_freq_factor", "floor_scale"),
    *("vision_args", "moe_args", "quantization_args", "lora_args", "max_batch_size", "max_seq_len"),
}
_KNOWN_CONTEXT = {16: 10_485_760, 128: 1_048_576}  # experts -> tokens: Scout and Maverick; params.json does not say


def read_params(params: Mapping[str, Any], files: Mapping[str, bytes], where: str) -> ModelConfig:
    """What a params.json says; what it has no key for is as in the released models."""
    if params.get("lora_args"):
        raise CheckpointError(f"{where}: lora_args is set, which is not supported", "use the bfloat16 checkpoint")
    meta_quantized.check_args(params.get("quantization_args") or {}, where)
    if unknown := sorted(params.keys() - set(_PARAMS.values()) - _OTHER):
        log.warning("%s: unknown keys are ignored: %s", where, ", ".join(unknown))
    given = {"n_kv_heads": params.get("n_heads"), "head_dim": None, **_DEFAULTS, **params}
    try:
        given["head_dim"] = given["head_dim"] or given["dim"] // given["n_heads"]
        facts = {field: given[key] for field, key in _PARAMS.items()}
    except KeyError as error:
        raise CheckpointError(f"{where} does not say {error}", "fetch the file again") from error
    moe = given.get("moe_args")
    dense, hidden = ffn_widths(given)
    scaling = None
    if given.get("use_scaled_rope"):  # low factor and original context are constants of Meta's code
        scaling = RopeScaling(factor=given.get("rope_scaling_factor") or 16.0, high_freq_factor=given.get("rope_high_freq_factor") or 1.0)
    num_experts = moe["num_experts"] if moe else 0
    return ModelConfig(
        **facts,
        dense_width=dense,
        hidden_width=hidden if moe else dense,
        num_experts=num_experts,
        experts_per_token=moe.get("top_k", 1) if moe else 1,
        moe_step=moe.get("interleave_moe_layer_step", 1) if moe else 1,
        rope_scaling=scaling,
        temperature_floor=int(given.get("floor_scale", 8192)),
        context_tokens=_KNOWN_CONTEXT.get(num_experts, 131072),
        chat_format=chat_format(files),
        vision=_read_vision(given["vision_args"]) if given.get("vision_args") else None,
    )


def _read_vision(args: Mapping[str, Any]) -> VisionConfig:
    return VisionConfig(
        width=args["dim"],
        num_layers=args["n_layers"],
        num_heads=args["n_heads"],
        hidden_width=int(args["mlp_ratio"] * args["dim"]),
        tile_pixels=args["image_size"]["height"],
        patch_pixels=args["patch_size"]["height"],
        shuffle=round(1 / args["pixel_shuffle_ratio"]),
        adapter_width=args["output_dim"],
    )


def ffn_widths(params: Mapping[str, Any]) -> tuple[int, int]:
    """(dense, expert) hidden width by Meta's rule. Source: llama4/model.py TransformerBlock and moe.py MoE."""
    multiple, multiplier = params.get("multiple_of", 256), params.get("ffn_dim_multiplier") or 1.0
    moe = params.get("moe_args") or {}

    def width(expansion: float, divisor: float) -> int:
        hidden = int(2 * int(expansion * params["dim"]) / 3)
        hidden = int(int(multiplier * hidden) / divisor)
        return hidden + -hidden % int(multiple)

    auto_scale = moe.get("auto_scale_F", True)
    divisor = moe.get("capacity_factor", 1.0) + 1 if auto_scale else 1.0
    return width(4, 1.0), width(params.get("ffn_exp") or 4, divisor)


def write_params(config: ModelConfig) -> dict[str, Any]:
    """params.json for a model, in keys that Meta's `ModelArgs` knows."""
    params: dict[str, Any] = {key: getattr(config, field) for field, key in _PARAMS.items()}
    params |= {"ffn_exp": 4.0, "ffn_dim_multiplier": 1.2, "multiple_of": 2048}
    params |= {"use_scaled_rope": config.rope_scaling is not None, "floor_scale": float(config.temperature_floor)}
    if config.rope_scaling:
        params |= {"rope_scaling_factor": config.rope_scaling.factor, "rope_high_freq_factor": config.rope_scaling.high_freq_factor}
    if config.num_experts:
        params["moe_args"] = {
            "num_experts": config.num_experts,
            "capacity_factor": 1.0,
            "auto_scale_F": True,
            "top_k": config.experts_per_token,
            "interleave_moe_layer_step": config.moe_step,
        }
    hidden = config.hidden_width if config.num_experts else None
    if ffn_widths(params)[0] != config.dense_width or (hidden and ffn_widths(params)[1] != hidden):
        _fit_widths(params, config.dense_width, hidden)
    if v := config.vision:
        params["vision_args"] = {
            "image_size": {"height": v.tile_pixels, "width": v.tile_pixels},
            "patch_size": {"height": v.patch_pixels, "width": v.patch_pixels},
            "dim": v.width,
            "n_layers": v.num_layers,
            "n_heads": v.num_heads,
            "mlp_ratio": v.hidden_width / v.width,
            "output_dim": v.adapter_width,
            "pixel_shuffle_ratio": 1 / v.shuffle,
        }
    return params


def _fit_widths(params: dict[str, Any], dense: int, hidden: int | None) -> None:
    """Choose the rule's knobs so that it gives these widths: the multiplier for the dense one, the capacity factor for the experts'.

    Each aims at a quarter above its width and rounds down to it: `multiple_of` is 1, so nothing is rounded up.
    """
    base = int(2 * int(4 * params["dim"]) / 3)
    params |= {"multiple_of": 1, "ffn_dim_multiplier": (dense + 0.25) / base}
    if hidden:
        params["moe_args"]["capacity_factor"] = dense / (hidden + 0.25) - 1
    assert ffn_widths(params) == (dense, hidden or ffn_widths(params)[1]), "the rule of widths was not met"
