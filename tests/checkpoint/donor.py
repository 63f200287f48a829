"""A small file of the donor's kind: a dense `llama` GGUF, as llama.cpp's converter writes one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import torch

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


def llama_file(path: Path, kind: gguf.GGMLQuantizationType, **changes: Any) -> dict[str, torch.Tensor]:
    """Write a dense `llama` file as llama.cpp's converter does, in the type `kind`; what it should be read as, by herd's names."""
    c = DONOR
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
    for herd, stored in random_source(DONOR).tensors.items():
        value = stored.read().numpy()
        if herd.startswith("layers."):
            _, layer, rest = herd.removesuffix(".weight").split(".", 2)
            name = f"blk.{layer}.{next(k for k, v in names.items() if v == rest)}.weight"
        else:
            name = {"embed.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}[herd]
        if value.ndim > 1:
            codes = gguf.quants.quantize(value, kind)
            writer.add_tensor(name, codes, raw_dtype=kind)
            read_as[herd] = torch.from_numpy(gguf.quants.dequantize(codes, kind))
        else:
            writer.add_tensor(name, value)
            read_as[herd] = torch.from_numpy(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read_as
