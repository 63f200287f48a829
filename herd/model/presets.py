"""The members of the family by name, to the last digit. Source: released config.json files; `behemoth` is our own guess."""

from dataclasses import replace

from herd.errors import ModelNotFound, nearest
from herd.model.config import ModelConfig, RopeScaling, VisionConfig

SCOUT = ModelConfig(
    width=5120,
    num_layers=48,
    num_heads=40,
    num_kv_heads=8,
    head_width=128,
    vocab_size=202048,
    hidden_width=8192,
    dense_width=16384,
    num_experts=16,
    moe_step=1,
    rope_scaling=RopeScaling(),
    qk_norm=True,
    context_tokens=10_485_760,
    vision=VisionConfig(),
)

MAVERICK = replace(SCOUT, num_experts=128, moe_step=2, rope_scaling=None, qk_norm=False, context_tokens=1_048_576)

# Llama Guard 4: Scout's shared experts alone. Dense, every layer local with unlimited span, so plain causal attention with RoPE.
GUARD = replace(SCOUT, num_experts=0, dense_width=8192, global_step=None, chunk_tokens=None, context_tokens=131072)

# Meta published 288B active, 16 experts and "nearly two trillion" parameters of Behemoth, and no dimension of it. This geometry is
# OURS, made to meet those three numbers with Scout's block in every layer: 287.7B active, 1.98T in all. It loads no weights of Meta's.
BEHEMOTH = replace(
    SCOUT,
    width=14336,
    num_layers=128,
    num_heads=112,
    num_kv_heads=8,
    hidden_width=20480,
    dense_width=40960,
    context_tokens=262144,
)

# A whole Llama 4 in miniature, for tests and first steps: 3 local layers and 1 global, chunk 16, byte vocabulary with specials.
TINY = ModelConfig(
    width=64,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_width=16,
    vocab_size=512,
    hidden_width=96,
    dense_width=128,
    num_experts=4,
    moe_step=1,
    chunk_tokens=16,
    rope_scaling=RopeScaling(original_tokens=64),
    qk_norm=True,
    temperature_floor=16,
    context_tokens=1024,
    bos_id=256,
    stop_ids=(257, 260, 261),
    pad_id=262,
    patch_id=268,
    vision=VisionConfig(width=32, num_layers=2, num_heads=2, hidden_width=128, tile_pixels=56, patch_pixels=14, adapter_width=48),
)

# SmolLM2-135M-Instruct as a Llama 4: dense, every layer local with RoPE, the chunk as long as the donor's context.
CRIA = ModelConfig(
    width=576,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_width=64,
    vocab_size=49152,
    hidden_width=1536,
    dense_width=1536,
    global_step=None,
    chunk_tokens=8192,
    rope_theta=100000.0,
    temperature_tuning=False,
    context_tokens=8192,
    tied=True,
    bos_id=None,
    stop_ids=(0, 2),
    pad_id=2,
    patch_id=-1,
    chat_format="chatml",
    advised_temperature=0.0,  # so small a model is at its best when it does not roll dice: docs/log.md has the count
    advised_top_p=1.0,
)

PRESETS = {"scout": SCOUT, "maverick": MAVERICK, "guard": GUARD, "behemoth": BEHEMOTH, "tiny": TINY, "cria": CRIA}


def preset(name: str) -> ModelConfig:
    """The config called `name`. Raises `ModelNotFound` with the nearest name."""
    if name not in PRESETS:
        raise ModelNotFound(f"no preset is called {name!r}", nearest(name, PRESETS) or f"there are: {', '.join(PRESETS)}")
    return PRESETS[name]
