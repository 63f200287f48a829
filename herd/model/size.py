"""How large a model is: parameters to the last digit, and bytes of weights and of keys and values. Nothing is allocated."""

from dataclasses import dataclass
from math import prod

from herd.model.config import ModelConfig
from herd.model.llama4 import build

WEIGHT_KINDS = ("fp32", "bf16", "fp8", "int4")
KV_KINDS = ("fp32", "bf16", "int8")
PAGE_RECORD_BYTES = 250  # of Python's objects for a page: its key, who holds it, its places in tables; 200 to 300 on CPython 3.11


@dataclass(frozen=True, slots=True)
class Parameters:
    """Numbers of parameters of one model."""

    text: int  # embedding, layers, head
    vision: int  # encoder, adapter, projector
    active: int  # of `text`, what one token passes through; embedding and head counted whole, as Meta counts
    quantized: int  # of `text`, what int4 files hold in fewer bits: all matrices of the layers but the router
    feed_forward: int  # of `quantized`, what fp8 files hold in 8 bits: experts, shared experts, dense layers

    @property
    def total(self) -> int:
        return self.text + self.vision


def parameters(config: ModelConfig) -> Parameters:
    """Count the parameters of the model that `config` describes, from its real modules on the meta device."""
    counts = {name: prod(p.shape) for name, p in build(config).named_parameters()}
    vision = sum(n for name, n in counts.items() if name.startswith(("vision.", "projector.")))
    experts = sum(n for name, n in counts.items() if ".experts." in name)
    idle = experts * (config.num_experts - config.experts_per_token) // config.num_experts if experts else 0
    matrices = {name: n for name, n in counts.items() if name.startswith("layers.") and "norm" not in name and "router" not in name}
    feed_forward = sum(n for name, n in matrices.items() if ".ffn." in name)
    text = sum(counts.values()) - vision
    quantized = sum(matrices.values())
    return Parameters(text=text, vision=vision, active=text - idle, quantized=quantized, feed_forward=feed_forward)


def weight_bytes(size: Parameters, kind: str) -> int:
    """Bytes of the weights held as `kind`. fp8: a byte each. int4: 4 bits and a 16-bit scale per 32. The rest stays in bf16."""
    if kind == "fp32":
        return 4 * size.total
    fewer, bits = {"bf16": (0, 16), "fp8": (size.feed_forward, 8), "int4": (size.quantized, 4.5)}[kind]
    return int(fewer * bits / 8) + 2 * (size.total - fewer)


def kv_bytes(config: ModelConfig, tokens: int, kind: str = "bf16") -> int:
    """Bytes of keys and values of one sequence: global layers keep every token, local layers the current chunk."""
    local = min(tokens, config.chunk_tokens) if config.chunk_tokens else tokens
    kept = len(config.global_layers) * tokens + len(config.local_layers) * local  # layer-tokens
    head = {"fp32": 4 * config.head_width, "bf16": 2 * config.head_width, "int8": config.head_width + 4}[kind]  # int8: and a float32 scale
    return kept * 2 * config.num_kv_heads * head


def record_bytes(config: ModelConfig, tokens: int, page_tokens: int = 16) -> int:
    """Bytes of what an engine has to know of the pages of one sequence: nothing beside a real model's keys and values."""
    local = min(tokens, config.chunk_tokens) if config.chunk_tokens else tokens
    pages = -(-tokens // page_tokens) * bool(config.global_layers) + -(-local // page_tokens) * bool(config.local_layers)
    return PAGE_RECORD_BYTES * pages
