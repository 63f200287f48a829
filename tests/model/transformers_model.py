"""A herd config and herd weights as Hugging Face's `Llama4ForConditionalGeneration` spells them.

Written apart from `herd/checkpoint` on purpose: what a test maps here must not share a mistake with what the product maps there.
"""

import torch
from torch import Tensor
from transformers import Llama4Config, Llama4ForConditionalGeneration

from herd.model.config import ModelConfig

BLOCK = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "ffn.gate": "feed_forward.gate_proj",
    "ffn.up": "feed_forward.up_proj",
    "ffn.down": "feed_forward.down_proj",
    "ffn.router": "feed_forward.router",
    "ffn.shared.gate": "feed_forward.shared_expert.gate_proj",
    "ffn.shared.up": "feed_forward.shared_expert.up_proj",
    "ffn.shared.down": "feed_forward.shared_expert.down_proj",
}

VISION_BLOCK = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
}

WHOLE = {
    "embed.weight": "language_model.model.embed_tokens.weight",
    "norm.weight": "language_model.model.norm.weight",
    "head.weight": "language_model.lm_head.weight",
    "projector.weight": "multi_modal_projector.linear_1.weight",
    "vision.patch.weight": "vision_model.patch_embedding.linear.weight",
    "vision.cls": "vision_model.class_embedding",
    "vision.positions": "vision_model.positional_embedding_vlm",
    "vision.norm_in.weight": "vision_model.layernorm_pre.weight",
    "vision.norm_in.bias": "vision_model.layernorm_pre.bias",
    "vision.norm_out.weight": "vision_model.layernorm_post.weight",
    "vision.norm_out.bias": "vision_model.layernorm_post.bias",
    "vision.adapter.up.weight": "vision_model.vision_adapter.mlp.fc1.weight",
    "vision.adapter.down.weight": "vision_model.vision_adapter.mlp.fc2.weight",
}


def as_transformers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename and lay out herd's parameters, or their gradients, as Hugging Face has them."""
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in WHOLE:
            out[WHOLE[name]] = tensor
        elif name.startswith("vision.layers."):
            _, _, layer, rest = name.split(".", 3)
            module, kind = rest.rsplit(".", 1)
            out[f"vision_model.model.layers.{layer}.{VISION_BLOCK[module]}.{kind}"] = tensor
        else:
            _, layer, rest = name.split(".", 2)
            prefix = f"language_model.model.layers.{layer}."
            if rest == "ffn.experts.gate":
                both = torch.cat([tensor, tensors[f"layers.{layer}.ffn.experts.up"]], dim=1)  # [E, 2F, D]
                out[prefix + "feed_forward.experts.gate_up_proj"] = both.transpose(1, 2)
            elif rest == "ffn.experts.down":
                out[prefix + "feed_forward.experts.down_proj"] = tensor.transpose(1, 2)
            elif rest != "ffn.experts.up":
                module, kind = rest.rsplit(".", 1)
                out[f"{prefix}{BLOCK[module]}.{kind}"] = tensor
    return out


def transformers_config(config: ModelConfig) -> Llama4Config:
    """Traps: a chunk of None is not allowed there, so it becomes one that is never full; a pad id would zero a row's gradient."""
    vision, scaling = config.vision, config.rope_scaling
    assert vision is not None
    assert vision.hidden_width == vision.width * vision.shuffle**2, "transformers has one number for the MLP and the adapter's input"
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_tokens,
        }
    text = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.hidden_width,
        "intermediate_size_mlp": config.dense_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_width,
        "rms_norm_eps": config.norm_eps,
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "moe_layers": None if config.num_experts else [],
        "interleave_moe_layer_step": config.moe_step,
        "use_qk_norm": config.qk_norm,
        "rope_parameters": rope,
        "no_rope_layers": None if config.global_step else [1] * config.num_layers,
        "no_rope_layer_interval": config.global_step or 4,
        "attention_chunk_size": config.chunk_tokens or 1_000_000,
        "attn_temperature_tuning": config.temperature_tuning,
        "floor_scale": config.temperature_floor,
        "attn_scale": config.temperature_scale,
        "pad_token_id": None,
    }
    eyes = {
        "hidden_size": vision.width,
        "intermediate_size": vision.hidden_width,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_heads,
        "image_size": vision.tile_pixels,
        "patch_size": vision.patch_pixels,
        "norm_eps": vision.norm_eps,
        "pixel_shuffle_ratio": 1 / vision.shuffle,
        "projector_input_dim": vision.adapter_width,
        "projector_output_dim": vision.adapter_width,
        "vision_output_dim": vision.adapter_width,
        "rope_parameters": {"rope_type": "default", "rope_theta": vision.rope_theta},
    }
    return Llama4Config(text_config=text, vision_config=eyes, image_token_index=config.patch_id, attn_implementation="eager")


def transformers_model(config: ModelConfig, weights: dict[str, Tensor]) -> Llama4ForConditionalGeneration:
    """Hugging Face's model of `config` in float32 with copies of herd's weights; every tensor must find its place."""
    model = Llama4ForConditionalGeneration(transformers_config(config)).eval()
    assert all(p.dtype == torch.float32 for p in model.parameters())
    model.load_state_dict(as_transformers(weights), strict=True)
    return model
