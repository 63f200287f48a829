"""GGUF, llama.cpp's format: reads `llama4` and dense `llama` files of any quantization, writes `llama4` files of floats or of blocks.

Names differ from herd's and layouts do not, so a tensor is a region of the file, dequantized by rows; where its blocks hold the same
numbers as herd's (Q4_0, Q4_1, Q8_0) they become herd's, and back (`gguf_blocks.py`); of all other types herd has blocks near them. What
matters is what llama.cpp *assumes* where the file says nothing. Source: llama.cpp, src/models/llama4.cpp and conversion/llama4.py:

    local layers have chunks of 8192 tokens, every 4th layer is global    temperature: floor 8192, scale 0.1
    QK norm is on unless there are exactly 128 experts                    no experts at all are refused
    RoPE scaling is a tensor of divisors, `rope_freqs.weight`             the shared expert is as wide as a routed one

A `llama` file (SmolLM2, Llama 3) is a Llama 4 whose layers are all local, with a chunk as long as its context.
"""

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.constants import GGMLQuantizationType as Kind
from gguf.constants import GGUFEndian
from torch import Tensor

from herd.checkpoint import gguf_blocks
from herd.checkpoint.names import check_tensors, file_tensors
from herd.checkpoint.rounding import with_near
from herd.checkpoint.safefile import bytes_of, write_all
from herd.checkpoint.source import Region, Source, Stored, check_expressible, held, mend_rope
from herd.checkpoint.vocabulary import spelled_merges, spelled_tokens, tokenizer_in
from herd.errors import CheckpointError
from herd.log import log
from herd.model.config import ModelConfig, RopeScaling
from herd.model.rope import frequencies
from herd.text.tokenizer import bpe_json

_FLOATS = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}
_KINDS = {dtype: kind for kind, dtype in _FLOATS.items()}
_ROPE_FREQS = "rope_freqs.weight"
_CONTROL, _USER_DEFINED, _UNUSED, _NORMAL = 3, 4, 5, 1  # token types
# llama.cpp ends a reply at these by their text, whatever the file's ids say. Source: llama-vocab.cpp.
_STOPS = ("<|end_of_text|>", "<|eom|>", "<|eot|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<|im_end|>")


# --- reading


def read(path: Path) -> Source:
    """Open a GGUF file; of a split one, give the first part. Raises `CheckpointError`."""
    readers = [(part, _reader(part)) for part in _parts(path)]
    facts = {name: field.contents() for _, reader in readers for name, field in reader.fields.items()}
    regions = {t.name: (part, t) for part, reader in readers for t in reader.tensors}
    shapes = {name: tuple(int(n) for n in reversed(t.shape)) for name, (_, t) in regions.items()}
    factors = _stored(*regions[_ROPE_FREQS]).read() if _ROPE_FREQS in regions else None
    config = mend_rope(_config(facts, shapes, factors, str(path)), str(path))
    wanted = file_tensors(config, "gguf")
    shapes.pop(_ROPE_FREQS, None)
    check_tensors(shapes, {name: t.shape for name, t in wanted.items()}, str(path))
    tensors = {t.herd[0]: _stored(*regions[name]) for name, t in wanted.items()}
    return Source(config=config, tensors=tensors, files=_tokenizer_files(facts), kind="gguf")


def _parts(path: Path) -> list[Path]:
    """The files of a model: one, or all of `name-00001-of-00003.gguf`."""
    stem, found, count = path.stem.partition("-00001-of-")
    if not found:
        return [path]
    paths = [path.with_name(f"{stem}-{i:05d}-of-{count}.gguf") for i in range(1, int(count) + 1)]
    if absent := [p.name for p in paths if not p.is_file()]:
        raise CheckpointError(
            f"{path.parent} lacks {len(absent)} of {len(paths)} parts of the model: {', '.join(absent[:3])}", "fetch them"
        )
    return paths


def _reader(path: Path) -> gguf.GGUFReader:
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        actual = path.stat().st_size
        raise CheckpointError(f"{path} ({actual:,} bytes) is cut short or broken: {error}", "fetch the file again") from error
    if reader.endianess != GGUFEndian.LITTLE:
        raise CheckpointError(f"{path} is big-endian", "convert it with gguf's gguf_convert_endian")
    return reader


def _stored(path: Path, t: Any) -> Stored:
    """One tensor of the file, dequantized by rows, with its blocks where herd has such; plain floats as they are."""
    shape = tuple(int(n) for n in reversed(t.shape))
    if t.tensor_type in _FLOATS:
        return Region(path, t.data_offset, shape, _FLOATS[t.tensor_type]).stored()
    try:
        gguf.quants.dequantize(np.zeros_like(t.data[:1]), t.tensor_type)
    except NotImplementedError as error:
        message = f"{path}: tensor {t.name} has type {t.tensor_type.name}, which is not read"
        raise CheckpointError(message, "use a file of floats or of another quantization") from error
    region = Region(path, t.data_offset, tuple(t.data.shape), torch.uint8)

    def rows(start: int, stop: int) -> Tensor:
        return torch.from_numpy(gguf.quants.dequantize(region.rows(start, stop).numpy(), t.tensor_type))

    name = f"{path}: {t.name}"
    if blocks := gguf_blocks.read(region, t.tensor_type, shape, name):
        return Stored(shape, torch.float32, rows, blocks=blocks)
    stored = Stored(shape, torch.float32, rows, rounded=t.tensor_type.name)
    if near := gguf_blocks.read_near(region, t.tensor_type, shape, name):
        return dataclasses.replace(stored, near=near)
    count, num_bytes = gguf.GGML_QUANT_SIZES[t.tensor_type]
    return with_near(name, stored, 8 * num_bytes / count)


def _config(facts: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], factors: Tensor | None, where: str) -> ModelConfig:
    """What llama.cpp takes the model to be."""
    arch = facts["general.architecture"]
    if arch not in ("llama", "llama4"):
        raise CheckpointError(f"{where} holds a {arch} model", "herd reads the architectures llama4 and (dense) llama")
    if "token_embd.weight" not in shapes:
        raise CheckpointError(f"{where} has no token_embd.weight", "a vocabulary alone is no model")

    def fact(key: str, default: Any = None) -> Any:
        value = facts.get(f"{arch}.{key}", default)
        if value is None:
            raise CheckpointError(f"{where} does not say {arch}.{key}", "fetch the file again")
        return value

    vocab_size, width = shapes["token_embd.weight"]
    num_heads, num_experts = fact("attention.head_count"), fact("expert_count", 0)
    head_width = fact("attention.key_length", width // num_heads)
    theta, scaling_type = fact("rope.freq_base", 10000.0), fact("rope.scaling.type", "none")
    _refuse(where, "rope.scaling.type", scaling_type, scaling_type == "none")
    _refuse(where, "rope.dimension_count", fact("rope.dimension_count", head_width), fact("rope.dimension_count", head_width) == head_width)
    is_llama4 = arch == "llama4"
    if is_llama4:
        _refuse(where, "expert_count", num_experts, num_experts > 0)
        _refuse(where, "attention.sliding_window", 0, fact("attention.sliding_window", 8192) > 0)
        _refuse(where, "attention.sliding_window_pattern", ..., fact("attention.sliding_window_pattern", 4) == 4)
    else:
        _refuse(where, "expert_count", num_experts, num_experts == 0)
    return ModelConfig(
        width=width,
        num_layers=fact("block_count"),
        num_heads=num_heads,
        num_kv_heads=fact("attention.head_count_kv", num_heads),
        head_width=head_width,
        vocab_size=vocab_size,
        hidden_width=fact("expert_feed_forward_length") if is_llama4 else fact("feed_forward_length"),
        dense_width=fact("feed_forward_length"),
        num_experts=num_experts,
        experts_per_token=fact("expert_used_count") if is_llama4 else 1,
        moe_step=fact("interleave_moe_layer_step") if is_llama4 else 1,
        global_step=4 if is_llama4 else None,
        chunk_tokens=8192 if is_llama4 else fact("context_length"),
        rope_theta=_float(theta),
        rope_scaling=None if factors is None else _scaling(factors, head_width, theta, where),
        qk_norm=is_llama4 and num_experts != 128,
        temperature_tuning=is_llama4,
        norm_eps=_float(fact("attention.layer_norm_rms_epsilon")),
        context_tokens=fact("context_length"),
        tied="output.weight" not in shapes,
        chat_format=_chat_format(facts, is_llama4, where),
        **_ids(facts, is_llama4),
    )


def _ids(facts: Mapping[str, Any], is_llama4: bool) -> dict[str, Any]:
    """The special ids that the tokenizer's lists tell; without them, Llama 4's."""
    tokens: list[str] | None = facts.get("tokenizer.ggml.tokens")
    if not tokens:
        return {}
    ids = {token: i for i, token in enumerate(tokens)}
    ends = {facts.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")} | {ids.get(name) for name in _STOPS}
    stop_ids = tuple(sorted(i for i in ends if i is not None))
    has_bos = facts.get("tokenizer.ggml.add_bos_token", is_llama4)
    return {
        "bos_id": facts.get("tokenizer.ggml.bos_token_id") if has_bos else None,
        "stop_ids": stop_ids,
        "pad_id": facts.get("tokenizer.ggml.padding_token_id", stop_ids[0] if stop_ids else 0),
        "patch_id": ids.get("<|patch|>", -1),
    }


def _refuse(where: str, key: str, value: Any, is_fine: bool) -> None:
    if not is_fine:
        raise CheckpointError(f"{where}: {key} = {value}, which herd does not compute", "it is another kind of model")


def _float(value: float) -> float:
    """A float32 of the file as the decimal that was meant: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _chat_format(facts: Mapping[str, Any], is_llama4: bool, where: str) -> str:
    template = facts.get("tokenizer.chat_template") or ""
    if "<|im_start|>" in template:
        return "chatml"
    if is_llama4:
        return "llama4"
    raise CheckpointError(
        f"{where}: a llama model whose chat template is not ChatML", "herd talks Llama 4's format and ChatML (`<|im_start|>`)"
    )


def _divisors(head_width: int, theta: float, scaling: RopeScaling) -> Tensor:
    """By how much each rotary frequency is divided: [K/2], as `rope_freqs.weight` holds it."""
    return frequencies(head_width, theta, None) / frequencies(head_width, theta, scaling)


def _scaling(factors: Tensor, head_width: int, theta: float, where: str) -> RopeScaling | None:
    """The scaling that makes these divisors; the file does not name it. Its original context is 8192 in every released Llama."""
    if torch.all(factors == 1):
        return None
    for high in (1.0, 4.0):
        guess = RopeScaling(factor=_float(factors.max().item()), low_freq_factor=1.0, high_freq_factor=high, original_tokens=8192)
        if factors.shape == (head_width // 2,) and torch.allclose(_divisors(head_width, theta, guess), factors.float(), rtol=1e-4):
            return guess
    raise CheckpointError(f"{where}: {_ROPE_FREQS} is no Llama 3 scaling with low 1, high 1 or 4, context 8192", "herd cannot express it")


def _tokenizer_files(facts: Mapping[str, Any]) -> dict[str, bytes]:
    tokens = facts.get("tokenizer.ggml.tokens")
    if not tokens:
        return {}
    if facts.get("tokenizer.ggml.model") != "gpt2":
        raise CheckpointError(f"the tokenizer is {facts.get('tokenizer.ggml.model')}, not byte-level BPE", "herd reads gpt2 tokenizers")
    types = facts["tokenizer.ggml.token_type"]
    specials = {token: i for i, token in enumerate(tokens) if types[i] in (_CONTROL, _USER_DEFINED)}
    pre = facts.get("tokenizer.ggml.pre", "default")
    files = {"tokenizer.json": bpe_json(tokens, facts.get("tokenizer.ggml.merges", []), pre=pre, specials=specials)}
    if template := facts.get("tokenizer.chat_template"):
        files["chat_template.jinja"] = template.encode()
    return files


# --- writing


def write(source: Source, path: Path, advance: Callable[[float], None]) -> None:
    """Write the text model as one `llama4` file, tensors as they come (float32, float16, bfloat16, blocks), norms and routers in float32.

    Raises `CheckpointError` that lists what llama.cpp cannot express. Vision is left out, with a warning.
    """
    config = source.config
    if not config.num_experts:
        raise CheckpointError(
            "GGUF's llama4 architecture has no dense models, and this model has no experts: no GGUF file can hold it for llama.cpp",
            "--to herd and --to hf write it; herd reads dense models from `llama` GGUF files and does not write those",
        )
    tensors = {name: _writable(name, source.tensors[t.herd[0]]) for name, t in file_tensors(config, "gguf").items()}
    if config.rope_scaling:
        tensors[_ROPE_FREQS] = held(_divisors(config.head_width, config.rope_theta, config.rope_scaling))
    facts = {**_facts(config), **_tokenizer_facts(source)}
    if any(stored.kind for stored in tensors.values()):
        facts["general.quantization_version"] = gguf.GGML_QUANT_VERSION
    shapes = {name: stored.shape for name, stored in tensors.items()}
    factors = tensors[_ROPE_FREQS].read() if config.rope_scaling else None
    _check(config, facts, shapes, factors)
    if left := [name for name in source.tensors if name.startswith(("vision.", "projector."))]:
        log.warning("a GGUF model file holds text only: %d vision tensors (%s, ...) are left out", len(left), left[0])
    logging.getLogger("gguf.gguf_writer").setLevel(logging.WARNING)
    writer = gguf.GGUFWriter(path, "llama4")
    for key, value in facts.items():
        _add(writer, key, value)
    lain = [gguf_blocks.write(stored.blocks) if stored.blocks else (stored, _KINDS[stored.dtype]) for stored in tensors.values()]
    for (name, shape), (stored, kind) in zip(shapes.items(), lain, strict=True):
        dtype = np.dtype(np.float32)  # raw_dtype decides
        writer.add_tensor_info(name, shape, dtype, stored.num_bytes, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        (file,) = writer.fout
        writer.write_padding(file, file.tell())
        for stored, _ in lain:
            for _, piece in stored.pieces():
                write_all(file.write, bytes_of(piece))
                advance(piece.nbytes)
            writer.write_padding(file, stored.num_bytes)
    finally:
        writer.close()


def _writable(name: str, stored: Stored) -> Stored:
    if len(stored.shape) == 1 or "ffn_gate_inp" in name:
        return stored.to(torch.float32)
    if stored.dtype not in _KINDS:
        raise CheckpointError(f"GGUF: {name} is {stored.dtype}", "convert with --dtype float32, float16 or bfloat16")
    return stored


def _facts(config: ModelConfig) -> dict[str, Any]:
    return {
        "general.architecture": "llama4",
        "llama4.vocab_size": config.vocab_size,
        "llama4.context_length": config.context_tokens,
        "llama4.embedding_length": config.width,
        "llama4.block_count": config.num_layers,
        "llama4.feed_forward_length": config.dense_width,
        "llama4.expert_feed_forward_length": config.hidden_width,
        "llama4.attention.head_count": config.num_heads,
        "llama4.attention.head_count_kv": config.num_kv_heads,
        "llama4.attention.key_length": config.head_width,
        "llama4.attention.value_length": config.head_width,
        "llama4.attention.layer_norm_rms_epsilon": config.norm_eps,
        "llama4.rope.freq_base": config.rope_theta,
        "llama4.rope.dimension_count": config.head_width,
        "llama4.expert_count": config.num_experts,
        "llama4.expert_used_count": config.experts_per_token,
        "llama4.interleave_moe_layer_step": config.moe_step,
    }


def _check(config: ModelConfig, facts: dict[str, Any], shapes: Mapping[str, tuple[int, ...]], factors: Tensor | None) -> None:
    """Raise unless llama.cpp will take the file for the model that it is."""
    read_back = _config(facts, shapes, factors, "llama.cpp's llama4")
    check_expressible(dataclasses.replace(config, vision=None), read_back, "llama.cpp's llama4")


def _tokenizer_facts(source: Source) -> dict[str, Any]:
    """The tokenizer's lists. Without a tokenizer the file runs on token ids alone."""
    tokenizer = tokenizer_in(source.files)
    if tokenizer is None:
        return {"tokenizer.ggml.model": "no_vocab"}
    if not tokenizer.merges():
        log.warning("the tokenizer has no merges, which llama.cpp cannot do; the file runs on token ids alone")
        return {"tokenizer.ggml.model": "no_vocab"}
    config = source.config
    tokens = spelled_tokens(tokenizer, config.vocab_size)
    special = set(tokenizer.specials.values())
    types = [_CONTROL if i in special else _NORMAL if tokenizer.token_bytes(i) else _UNUSED for i in range(config.vocab_size)]
    facts: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": tokenizer.pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": spelled_merges(tokenizer),
        "tokenizer.ggml.add_bos_token": config.bos_id is not None,
        "tokenizer.ggml.padding_token_id": config.pad_id,
    }
    if config.stop_ids:
        facts["tokenizer.ggml.eos_token_id"] = config.stop_ids[-1]
    if config.bos_id is not None:
        facts["tokenizer.ggml.bos_token_id"] = config.bos_id
    if template := _template(source.files):
        facts["tokenizer.chat_template"] = template
    return facts


def _template(files: Mapping[str, bytes]) -> str:
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode()
    found = json.loads(files.get("tokenizer_config.json", b"{}")).get("chat_template", "")
    return found if isinstance(found, str) else ""


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif key != "general.architecture":  # the writer sets that itself
        writer.add_string(key, value)
