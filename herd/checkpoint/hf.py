"""Hugging Face's format: config.json and safetensors, as Meta released Llama 4 there and as transformers saves it.

Names and layouts are in `names.py`; this file is about config.json. It has come in several spellings, all read here: nested or text
only, `rope_theta` + `rope_scaling` (as released) or `rope_parameters` (transformers 5), prefixes of tensor names that come and go.
Written is the released spelling, which every version reads. Traps: `intermediate_size` is of the experts, `intermediate_size_mlp` of
dense layers; 1 in `no_rope_layers` means the layer HAS RoPE; the vision `intermediate_size` is also the input width of the adapter.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from herd.checkpoint import compressed, safefile
from herd.checkpoint.names import FileTensor, check_tensors, file_tensors
from herd.checkpoint.source import TOKENIZER_FILES, Source, Stored, chat_format, check_expressible, mend_rope
from herd.checkpoint.vocabulary import tokenizer_in, tokenizer_json
from herd.errors import CheckpointError
from herd.log import log
from herd.model.config import ModelConfig, RopeScaling, VisionConfig

CONFIG = "config.json"
_GENERATION = "generation_config.json"
_ADVISED = {"advised_temperature": "temperature", "advised_top_p": "top_p"}  # in generation_config.json

# herd's field <- transformers' key and the default that transformers gives it. Source: configuration_llama4.py.
_TEXT: dict[str, tuple[str, Any]] = {
    "width": ("hidden_size", 5120),
    "num_layers": ("num_hidden_layers", 48),
    "num_heads": ("num_attention_heads", 40),
    "num_kv_heads": ("num_key_value_heads", 8),
    "head_width": ("head_dim", 128),
    "vocab_size": ("vocab_size", 202048),
    "hidden_width": ("intermediate_size", 8192),
    "dense_width": ("intermediate_size_mlp", 16384),
    "num_experts": ("num_local_experts", 16),
    "experts_per_token": ("num_experts_per_tok", 1),
    "moe_step": ("interleave_moe_layer_step", 1),
    "chunk_tokens": ("attention_chunk_size", 8192),
    "qk_norm": ("use_qk_norm", True),
    "temperature_tuning": ("attn_temperature_tuning", True),
    "temperature_floor": ("floor_scale", 8192),
    "temperature_scale": ("attn_scale", 0.1),
    "norm_eps": ("rms_norm_eps", 1e-5),
    "context_tokens": ("max_position_embeddings", 131072),
    "bos_id": ("bos_token_id", 1),
    "pad_id": ("pad_token_id", None),
}
_VISION: dict[str, tuple[str, Any]] = {
    "width": ("hidden_size", 768),
    "num_layers": ("num_hidden_layers", 34),
    "num_heads": ("num_attention_heads", 16),
    "hidden_width": ("intermediate_size", 5632),
    "tile_pixels": ("image_size", 448),
    "patch_pixels": ("patch_size", 14),
    "adapter_width": ("projector_output_dim", 4096),
    "norm_eps": ("norm_eps", 1e-5),
}
# Keys that say nothing about the model's forward; any value passes.
_HARMLESS = {
    *("_name_or_path", "architectures", "torch_dtype", "dtype", "transformers_version", "model_type", "use_cache", "cache_implementation"),
    *("initializer_range", "output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "for_llm_compressor"),
    *("boi_token_index", "eoi_token_index", "attn_implementation", "_attn_implementation_autoset", "vision_feature_layer"),
    *("vision_feature_select_strategy", "return_dict", "output_hidden_states", "output_attentions", "id2label", "label2id"),
}
# Keys that must have this value (or be absent): herd computes nothing else.
_ONLY_TEXT = {"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0}
_ONLY_VISION = {
    "hidden_act": "gelu",
    "num_channels": 3,
    "multi_modal_projector_bias": False,
    "projector_dropout": 0.0,
    "attention_dropout": 0.0,
}
_READ_TEXT = {
    "eos_token_id",
    "tie_word_embeddings",
    "moe_layers",
    "no_rope_layers",
    "no_rope_layer_interval",
    "layer_types",
    "quantization_config",
}
_READ_ROPE = {"rope_theta", "rope_scaling", "rope_parameters"}
_READ_VISION = {"pixel_shuffle_ratio", "vision_output_dim", "projector_input_dim"}


# --- reading


def read(folder: Path) -> Source:
    """Open a checkpoint folder. Raises `CheckpointError` for what is broken, unknown or not supported."""
    files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
    generation = _read_json(folder / _GENERATION) if (folder / _GENERATION).is_file() else {}
    where = str(folder / CONFIG)
    data = _read_json(folder / CONFIG)
    config = mend_rope(read_config(data, generation, files, where), where)
    quantization = data.get("quantization_config") or data.get("text_config", {}).get("quantization_config")
    regions = {_plain_name(name): region for name, region in safefile.read_folder(folder).items()}
    found = {name: region.stored() for name, region in regions.items()}
    if quantization:
        found = compressed.matrices(regions, compressed.read_config(quantization, where))
    if config.tied:  # some writers save the head although it is the embedding
        found.pop("language_model.lm_head.weight", None)
    wanted = file_tensors(config, "hf")
    shapes = {name: stored.shape for name, stored in found.items()}
    tensors: dict[str, Stored] = {}
    if any(".experts.0." in name for name in found):  # quantizers give each expert its own matrices
        places = compressed.split(wanted)
        check_tensors(shapes, {name: place.shape for name, place in places.items()}, str(folder))
        tensors = compressed.gather(found, places)
    else:
        check_tensors(shapes, {name: t.shape for name, t in wanted.items()}, str(folder))
        for name, t in wanted.items():
            tensors.update(_split(found[name], t))
    tensors = {name: tensors[name] for t in wanted.values() for name in t.herd}
    return Source(config=config, tensors=tensors, files=files, kind="hf")


def _plain_name(name: str) -> str:
    """The released name of a tensor: text-only files leave out `language_model.`, some tools put `model.` before everything."""
    for ours, theirs in (
        ("language_model.model.", "model.language_model.model."),
        ("language_model.lm_head.", "model.language_model.lm_head."),
        ("vision_model.", "model.vision_model."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
        ("language_model.model.", "model.language_model."),
        ("language_model.model.", "model."),
        ("language_model.lm_head.", "lm_head."),
    ):
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def _split(stored: Stored, t: FileTensor) -> dict[str, Stored]:
    """A file's tensor as the herd tensors in it."""
    if not t.turned:
        return {t.herd[0]: stored}
    E, D, out = t.shape  # only experts are turned: [E, in, out], and gate and up share one
    width = out // len(t.herd)

    def part(i: int) -> Stored:
        def rows(start: int, stop: int) -> Tensor:
            return stored.rows(start, stop)[..., i * width : (i + 1) * width].transpose(1, 2).contiguous()

        return Stored((E, width, D), stored.dtype, rows)

    return {herd: part(i) for i, herd in enumerate(t.herd)}


def read_config(data: Mapping[str, Any], generation: Mapping[str, Any], files: Mapping[str, bytes], where: str) -> ModelConfig:
    """What a config.json says. generation: generation_config.json, whose stop ids rule.  files: the tokenizer's, for the chat format."""
    kind = data.get("model_type")
    if kind not in ("llama4", "llama4_text"):
        names = ", ".join(data.get("architectures") or ["no architecture"])
        raise CheckpointError(f"{where}: model_type {kind!r} ({names}) is not supported", "herd reads llama4 and llama4_text")
    text = {**data.get("text_config", {})} if kind == "llama4" else {**data}
    is_text_only = kind == "llama4_text" or data.get("architectures") == ["Llama4ForCausalLM"]
    vision = None if is_text_only else data.get("vision_config")
    outer = data if kind == "llama4" else {}
    _refuse_others(text, _ONLY_TEXT, where)
    _refuse_others(vision or {}, _ONLY_VISION, where)
    _warn_unknown(outer, text, vision or {}, where)

    facts = {field: text.get(key, default) for field, (key, default) in _TEXT.items()}
    facts["temperature_tuning"] = bool(facts["temperature_tuning"])  # the first release had an int, 4
    facts["rope_theta"], facts["rope_scaling"] = _rope(text, where)
    facts["tied"] = bool(text.get("tie_word_embeddings", data.get("tie_word_embeddings", False)))
    facts["stop_ids"] = _ids(generation.get("eos_token_id", text.get("eos_token_id", 2)))
    facts |= {herd: float(generation[theirs]) for herd, theirs in _ADVISED.items() if generation.get(theirs) is not None}
    if generation.get("do_sample") is False and "temperature" not in generation:
        facts |= {"advised_temperature": 0.0, "advised_top_p": 1.0}
    if facts["pad_id"] is None:
        facts["pad_id"] = facts["stop_ids"][0] if facts["stop_ids"] else 0
    facts["patch_id"] = data.get("image_token_index", ModelConfig.__dataclass_fields__["patch_id"].default)
    facts["chat_format"] = chat_format(files)
    facts["global_step"] = _global_step(text, facts["num_layers"], where)
    _check_moe_layers(text, facts, where)
    _check_layer_types(text, facts, where)
    images = json.loads(files.get("preprocessor_config.json", b"{}"))
    return ModelConfig(**facts, vision=_read_vision(vision, images, where) if vision else None)


def _read_vision(vision: Mapping[str, Any], images: Mapping[str, Any], where: str) -> VisionConfig:
    facts = {field: vision.get(key, default) for field, (key, default) in _VISION.items()}
    for field in ("tile_pixels", "patch_pixels"):
        if isinstance(facts[field], list):
            if len(set(facts[field])) != 1:
                raise CheckpointError(f"{where}: {field} {facts[field]} is no square")
            facts[field] = facts[field][0]
    facts["shuffle"] = round(1 / vision.get("pixel_shuffle_ratio", 0.5))
    facts["rope_theta"], scaling = _rope(vision, where, default=10000.0)
    inner, out = vision.get("projector_input_dim", 4096), vision.get("vision_output_dim", 7680)
    if not inner == out == facts["adapter_width"]:
        raise CheckpointError(
            f"{where}: projector_input_dim {inner}, projector_output_dim {facts['adapter_width']} and vision_output_dim {out} differ",
            "in Llama 4 they are one width",
        )
    if facts["hidden_width"] != facts["width"] * facts["shuffle"] ** 2:
        raise CheckpointError(
            f"{where}: the vision intermediate_size {facts['hidden_width']} is not hidden_size {facts['width']} * {facts['shuffle']}^2",
            "it is also the input width of the adapter",
        )
    if scaling:
        raise CheckpointError(f"{where}: the vision encoder has RoPE scaling, which is not supported")
    return VisionConfig(**facts, max_tiles=images.get("max_patches", 16))


def _rope(text: Mapping[str, Any], where: str, default: float = 500000.0) -> tuple[float, RopeScaling | None]:
    """theta and scaling, in either spelling."""
    new = text.get("rope_parameters") or {}
    scaling = new or text.get("rope_scaling") or {}
    theta = new.get("rope_theta", text.get("rope_theta", default))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise CheckpointError(f"{where}: RoPE scaling of type {kind!r} is not supported", "herd computes default and llama3")
    try:
        return theta, RopeScaling(
            factor=scaling["factor"],
            low_freq_factor=scaling["low_freq_factor"],
            high_freq_factor=scaling["high_freq_factor"],
            original_tokens=scaling["original_max_position_embeddings"],
        )
    except KeyError as error:
        raise CheckpointError(f"{where}: the RoPE scaling lacks {error}") from error


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, list) else () if value is None else (value,)


def _global_step(text: Mapping[str, Any], num_layers: int, where: str) -> int | None:
    flags = text.get("no_rope_layers") or []
    if not flags:
        step = text.get("no_rope_layer_interval", 4)
        return step if step and step <= num_layers else None
    if len(flags) < num_layers:
        raise CheckpointError(f"{where}: no_rope_layers has {len(flags)} entries for {num_layers} layers")
    flags = [bool(flag) for flag in flags[:num_layers]]
    if all(flags):
        return None
    step = flags.index(False) + 1
    if flags != [(i + 1) % step != 0 for i in range(num_layers)]:
        raise CheckpointError(
            f"{where}: no_rope_layers is irregular: {[int(f) for f in flags]}", "every n-th layer must be the one without"
        )
    return step


def _check_moe_layers(text: Mapping[str, Any], facts: dict[str, Any], where: str) -> None:
    """Experts must be in every moe_step-th layer; an empty list makes the model dense."""
    listed = text.get("moe_layers")
    if listed == [] or not facts["num_experts"]:
        facts.update(num_experts=0, experts_per_token=1, moe_step=1)
    elif listed is not None:
        step = facts["moe_step"]
        regular = list(range(step - 1, facts["num_layers"], step)) if step else []
        if sorted(listed) != regular:
            raise CheckpointError(f"{where}: moe_layers {listed} is not every {step}th of {facts['num_layers']} layers")


def _check_layer_types(text: Mapping[str, Any], facts: dict[str, Any], where: str) -> None:
    """transformers masks by `layer_types` and turns by `no_rope_layers`; in herd a local layer has both, a global one neither."""
    step, types = facts["global_step"], text.get("layer_types") or []
    is_local = [step is None or (i + 1) % step != 0 for i in range(len(types))]
    local_types = {kind for kind, local in zip(types, is_local, strict=True) if local}
    global_types = {kind for kind, local in zip(types, is_local, strict=True) if not local}
    if global_types - {"full_attention"} or local_types not in (set(), {"chunked_attention"}, {"full_attention"}):
        raise CheckpointError(f"{where}: layer_types does not follow no_rope_layers: {types}", "local layers are chunked, global ones full")
    if local_types == {"full_attention"}:
        facts["chunk_tokens"] = None


def _refuse_others(values: Mapping[str, Any], only: Mapping[str, Any], where: str) -> None:
    for key, fine in only.items():
        if key in values and values[key] not in (fine, None):
            value = values[key]["quant_method"] if isinstance(values[key], dict) and "quant_method" in values[key] else values[key]
            raise CheckpointError(f"{where}: {key} = {value!r} is not supported", f"herd computes {key} = {fine!r} only")


def _warn_unknown(outer: Mapping[str, Any], text: Mapping[str, Any], vision: Mapping[str, Any], where: str) -> None:
    """One line that names every key herd does not know."""
    known_text = {key for key, _ in _TEXT.values()} | _ONLY_TEXT.keys() | _READ_TEXT | _READ_ROPE | _HARMLESS
    known_vision = {key for key, _ in _VISION.values()} | _ONLY_VISION.keys() | _READ_VISION | _READ_ROPE | _HARMLESS
    known_outer = {"text_config", "vision_config", "image_token_index", "tie_word_embeddings", "quantization_config"} | _HARMLESS
    known_outer |= {"bos_token_id", "eos_token_id", "pad_token_id"}  # repeated from the text config by some versions
    unknown = [*sorted(outer.keys() - known_outer), *sorted(f"text_config.{k}" for k in text.keys() - known_text)]
    unknown += sorted(f"vision_config.{k}" for k in vision.keys() - known_vision)
    if unknown:
        log.warning("%s: unknown keys are ignored: %s", where, ", ".join(unknown))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}", "fetch the file again") from error


# --- writing


def write(source: Source, folder: Path, advance: Callable[[float], None], *, shard_bytes: int = safefile.SHARD_BYTES) -> None:
    """Write a source into an empty folder as transformers reads it; int4 and fp8 as compressed-tensors does, which servers read.

    Raises `CheckpointError` for a model that the format cannot express.
    """
    config = source.config
    data, generation = write_config(config, source.dtype)
    files = {**_tokenizer_files(source), **source.files}
    check_expressible(config, read_config(data, generation, files, "config.json"), "config.json")
    prefix = "" if config.vision else "language_model."
    wanted = {name.removeprefix(prefix): t for name, t in file_tensors(config, "hf").items()}
    if any(compressed.is_writable(stored) for stored in source.tensors.values()):
        tensors, data["quantization_config"] = compressed.lay_out(source.tensors, compressed.split(wanted))
    else:
        tensors = {name: _join([source.tensors[herd] for herd in t.herd], t) for name, t in wanted.items()}
    (folder / CONFIG).write_text(json.dumps(data, indent=2) + "\n")
    (folder / _GENERATION).write_text(json.dumps(generation, indent=2) + "\n")
    for name, content in files.items():
        (folder / name).write_bytes(content)
    safefile.write_folder(folder, tensors, advance, shard_bytes=shard_bytes)


def _tokenizer_files(source: Source) -> dict[str, bytes]:
    """What transformers needs beside what the source has. No chat template: herd renders messages itself and has none to give."""
    tokenizer = tokenizer_in(source.files)
    if tokenizer is None:
        return {}
    names, config = {i: name for name, i in tokenizer.specials.items()}, source.config
    facts = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None if config.bos_id is None else names.get(config.bos_id),
        "eos_token": names.get(config.stop_ids[-1]) if config.stop_ids else None,
        "pad_token": names.get(config.pad_id),
        "model_max_length": config.context_tokens,
    }
    files = {"tokenizer_config.json": json.dumps(facts, indent=2).encode()}
    if "tokenizer.json" not in source.files:
        files["tokenizer.json"] = tokenizer_json(tokenizer)
    return files


def _join(parts: list[Stored], t: FileTensor) -> Stored:
    """Herd tensors as one of the file's."""
    if not t.turned:
        return parts[0]

    def rows(start: int, stop: int) -> Tensor:
        return torch.cat([part.rows(start, stop).transpose(1, 2) for part in parts], dim=2)

    return Stored(t.shape, parts[0].dtype, rows)


def write_config(config: ModelConfig, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and generation_config.json for a model."""
    layers = range(config.num_layers)
    text: dict[str, Any] = {key: getattr(config, field) for field, (key, _) in _TEXT.items()}
    text |= {
        "model_type": "llama4_text",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "eos_token_id": list(config.stop_ids),
        "tie_word_embeddings": config.tied,
        "moe_layers": [i for i in layers if config.is_moe(i)],
        "no_rope_layers": [int(config.is_local(i)) for i in layers],
        "layer_types": ["chunked_attention" if config.is_local(i) and config.chunk_tokens else "full_attention" for i in layers],
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if config.rope_scaling:
        text["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": config.rope_scaling.factor,
            "low_freq_factor": config.rope_scaling.low_freq_factor,
            "high_freq_factor": config.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": config.rope_scaling.original_tokens,
        }
    generation = {"bos_token_id": config.bos_id, "eos_token_id": list(config.stop_ids), "pad_token_id": config.pad_id}
    generation["do_sample"] = config.advised_temperature > 0  # transformers refuses a temperature of 0
    if generation["do_sample"]:
        generation |= {theirs: getattr(config, herd) for herd, theirs in _ADVISED.items()}
    if config.vision is None:
        return {"architectures": ["Llama4ForCausalLM"], **text}, generation
    data = {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "image_token_index": config.patch_id,
        "tie_word_embeddings": config.tied,
        "torch_dtype": text["torch_dtype"],
        "text_config": text,
        "vision_config": _write_vision(config.vision),
    }
    return data, generation


def _write_vision(vision: VisionConfig) -> dict[str, Any]:
    return {key: getattr(vision, field) for field, (key, _) in _VISION.items()} | {
        "model_type": "llama4_vision_model",
        "hidden_act": "gelu",
        "num_channels": 3,
        "pixel_shuffle_ratio": 1 / vision.shuffle,
        "projector_input_dim": vision.adapter_width,
        "vision_output_dim": vision.adapter_width,
        "multi_modal_projector_bias": False,
        "projector_dropout": 0.0,
        "attention_dropout": 0.0,
        "rope_theta": vision.rope_theta,
    }
