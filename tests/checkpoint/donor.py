"""A small file of the donor's kind: a dense `llama` GGUF, as llama.cpp's converter writes one."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from herd.model.config import ModelConfig
from herd.model.presets import CRIA
from tests.checkpoint.made import random_source

DONOR = replace(
    CRIA,
    width=64,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_width=32,
    vocab_size=96,
    hidden_width=128,
    dense_width=128,
    advised_temperature=0.6,  # a GGUF has no place for these two
    advised_top_p=0.9,
)


WIDE_DONOR = replace(DONOR, width=256, num_heads=8, num_kv_heads=4, hidden_width=512, dense_width=512)  # K-quants have blocks of 256

# Bytes of a block that are float16 factors, for types which the gguf package reads and does not write. Source: llama.cpp, ggml-common.h.
_FACTORS = {"Q2_K": (80, 84), "Q3_K": (108, 110), "Q4_K": (0, 4), "Q5_K": (0, 4), "Q6_K": (208, 210), "IQ4_NL": (0, 2), "IQ4_XS": (0, 2)}


def quantized(value: np.ndarray, kind: gguf.GGMLQuantizationType, seed: int = 0) -> np.ndarray:
    """A matrix as bytes of a type; of one that the package cannot write random codes, as large as the matrix on average."""
    if kind.name not in _FACTORS:
        return gguf.quants.quantize(value, kind)
    count, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    first, last = _FACTORS[kind.name]
    data = np.random.default_rng(seed).integers(0, 256, (value.shape[0], value.shape[1] // count, num_bytes), dtype=np.uint8)
    factor = 1.0
    for _ in range(2):  # values are proportional to the factors
        data[..., first:last] = np.frombuffer(np.float16(factor).tobytes() * ((last - first) // 2), np.uint8)
        made = data.reshape(value.shape[0], -1)
        factor = float(value.std() / gguf.quants.dequantize(made, kind).std())
    return made


def llama_file(
    path: Path,
    kind: gguf.GGMLQuantizationType,
    config: ModelConfig = DONOR,
    others: Mapping[str, gguf.GGMLQuantizationType] | None = None,
    **changes: Any,
) -> dict[str, torch.Tensor]:
    """Write a dense `llama` file as llama.cpp's converter does, in the type `kind`; what it should be read as, by herd's names.

    others: the types of matrices that have another, by what herd's name ends in.
    """
    c = config
    facts: dict[str, Any] = {
        "llama.block_count": c.num_layers,
        "llama.context_length": c.context_tokens,
        "llama.embedding_length": c.width,
        "llama.feed_forward_length": c.dense_width,
        "llama.attention.head_count": c.num_heads,
        "llama.attention.head_count_kv": c.num_kv_heads,
        "llama.attention.layer_norm_rms_epsilon": c.norm_eps,
        "llama.rope.freq_base": c.rope_theta,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(chr(33 + i) for i in range(93))],
        "tokenizer.ggml.token_type": [3] * 3 + [1] * 93,
        "tokenizer.ggml.merges": ["! !"],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": "<|im_start|>",
        **changes,
    }
    writer = gguf.GGUFWriter(path, facts.pop("general.architecture", "llama"))
    for key, value in facts.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif value is not ...:
            writer.add_string(key, value)
    read_as = {}
    names = {"ffn_norm": "ffn_norm", "attn_norm": "attention_norm", "attn_output": "attention.o"}
    names |= {f"attn_{x}": f"attention.{x}" for x in "qkv"} | {f"ffn_{x}": f"ffn.{x}" for x in ("gate", "up", "down")}
    for herd, stored in random_source(c).tensors.items():
        value = stored.read().numpy()
        if herd.startswith("layers."):
            _, layer, rest = herd.removesuffix(".weight").split(".", 2)
            name = f"blk.{layer}.{next(k for k, v in names.items() if v == rest)}.weight"
        else:
            name = {"embed.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}[herd]
        if value.ndim > 1:
            own = next((other for end, other in (others or {}).items() if herd.endswith(end)), kind)
            codes = quantized(value, own)
            writer.add_tensor(name, codes, raw_dtype=own)
            read_as[herd] = torch.from_numpy(gguf.quants.dequantize(codes, own))
        else:
            writer.add_tensor(name, value)
            read_as[herd] = torch.from_numpy(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read_as
