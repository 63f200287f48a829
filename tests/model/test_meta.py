"""herd's model equals Meta's reference code (`llama_models.llama4`) in float32, fed with tensors named as in Meta's files.

The reference builds its mask for one whole prompt, so it is right for that and asked for that only; it has no way to train.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from herd.model.config import ModelConfig, RopeScaling
from herd.ops.attend import Packed
from tests.model.fairscale_standin import meta_reference
from tests.model.small import SCOUT, Prompt, packed_logits, random_model, random_prompt

# Meta states widths by a rule: ffn_exp 4, multiplier 1.2, multiple of 8, half for each of shared and routed expert. From a width of 48
# that makes 80 for an expert and 160 for a dense layer. Its head width is width / heads, its scaling starts from 8192 tokens always.
META = replace(SCOUT, num_heads=6, num_kv_heads=2, head_width=8, hidden_width=80, dense_width=160, rope_theta=500000.0)
HARD, BLENDED = RopeScaling(), RopeScaling(factor=8.0, high_freq_factor=4.0)
CASES = {
    "scout": replace(META, rope_scaling=HARD),
    "scout, wide heads": replace(META, rope_scaling=HARD, num_heads=2, num_kv_heads=1, head_width=24),
    "maverick": replace(META, moe_step=2, num_experts=8, rope_scaling=None, qk_norm=False),
    "guard": replace(META, num_experts=0, rope_scaling=HARD, global_step=None, chunk_tokens=None),
    "2 experts, blended scaling": replace(META, rope_scaling=BLENDED, experts_per_token=2),
}


@pytest.fixture(scope="module")
def meta() -> Iterator[SimpleNamespace]:
    with meta_reference() as modules:
        yield modules
    left = [name for name in sys.modules if name.startswith(("fairscale", "llama_models.llama4.model"))]
    assert not left, "the stand-ins stayed behind"


def meta_args(meta: SimpleNamespace, config: ModelConfig, num_tokens: int) -> Any:
    vision, scaling = config.vision, config.rope_scaling
    assert vision is not None
    return meta.args.ModelArgs(
        dim=config.width,
        n_layers=config.num_layers,
        n_heads=config.num_heads,
        n_kv_heads=config.num_kv_heads,
        vocab_size=config.vocab_size,
        ffn_exp=4.0,
        ffn_dim_multiplier=1.2,
        multiple_of=8,
        norm_eps=config.norm_eps,
        attention_chunk_size=config.chunk_tokens,
        rope_theta=config.rope_theta,
        use_scaled_rope=scaling is not None,
        rope_scaling_factor=scaling and scaling.factor,
        rope_high_freq_factor=scaling and scaling.high_freq_factor,
        nope_layer_interval=config.global_step,
        use_qk_norm=config.qk_norm,
        attn_temperature_tuning=config.temperature_tuning,
        floor_scale=config.temperature_floor,
        attn_scale=config.temperature_scale,
        moe_args=meta.args.MoEArgs(
            num_experts=config.num_experts, top_k=config.experts_per_token, interleave_moe_layer_step=config.moe_step
        )
        if config.num_experts
        else None,
        vision_args=meta.args.VisionArgs(
            image_size={"height": vision.tile_pixels, "width": vision.tile_pixels},
            patch_size={"height": vision.patch_pixels, "width": vision.patch_pixels},
            dim=vision.width,
            n_layers=vision.num_layers,
            n_heads=vision.num_heads,
            mlp_ratio=vision.hidden_width / vision.width,
            output_dim=vision.adapter_width,
            pixel_shuffle_ratio=1 / vision.shuffle,
        ),
        max_batch_size=1,
        max_seq_len=num_tokens,
    )


EYES = "vision_embeddings.vision_encoder."
WHOLE = {
    "embed.weight": "tok_embeddings.weight",
    "norm.weight": "norm.weight",
    "head.weight": "output.weight",
    "projector.weight": "vision_projection.weight",
    "vision.patch.weight": EYES + "conv1._linear.weight",
    "vision.cls": EYES + "class_embedding",
    "vision.positions": EYES + "positional_embedding_vlm",
    "vision.norm_in.weight": EYES + "ln_pre.weight",
    "vision.norm_in.bias": EYES + "ln_pre.bias",
    "vision.norm_out.weight": EYES + "ln_post.weight",
    "vision.norm_out.bias": EYES + "ln_post.bias",
    "vision.adapter.up.weight": "vision_embeddings.vision_adapter.mlp.c_fc.weight",
    "vision.adapter.down.weight": "vision_embeddings.vision_adapter.mlp.c_proj.weight",
}
VISION_BLOCK = {
    "attention_norm": "ln_1",
    "mlp_norm": "ln_2",
    "attention.q": "attn.wq",
    "attention.k": "attn.wk",
    "attention.v": "attn.wv",
    "attention.o": "attn.wo",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}


def as_meta(config: ModelConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """herd's weights as Meta's files have them; the reference's own load hooks take them from there."""
    out = {theirs: weights[ours] for ours, theirs in WHOLE.items()}
    for name, tensor in weights.items():
        if name.startswith("vision.layers."):
            _, _, layer, rest = name.split(".", 3)
            module, kind = rest.rsplit(".", 1)
            out[f"{EYES}transformer.resblocks.{layer}.{VISION_BLOCK[module]}.{kind}"] = tensor
    for layer in range(config.num_layers):
        ours = {name.removeprefix(f"layers.{layer}."): t for name, t in weights.items() if name.startswith(f"layers.{layer}.")}
        theirs = {
            "attention.wqkv.layer_norm_weight": ours["attention_norm.weight"],
            "attention.wqkv.weight": torch.cat([ours[f"attention.{x}.weight"] for x in "qkv"]),
            "attention.wo.weight": ours["attention.o.weight"],
        }
        if config.is_moe(layer):
            gate, up, down = (ours[f"ffn.experts.{x}"].transpose(1, 2) for x in ("gate", "up", "down"))  # [E, D, F] twice, [E, F, D]
            theirs |= {
                "feed_forward.norm.weight": ours["ffn_norm.weight"],
                "feed_forward.router_DE": ours["ffn.router.weight"].T,
                "feed_forward.experts.moe_w_in_eD_F": gate.flatten(0, 1),
                "feed_forward.experts.moe_w_swiglu_eD_F": up.flatten(0, 1),
                "feed_forward.experts.moe_w_out_eF_D": down.flatten(0, 1),
                "feed_forward.w_in_shared_FD.weight": ours["ffn.shared.gate.weight"],
                "feed_forward.w_swiglu_FD.weight": ours["ffn.shared.up.weight"],
                "feed_forward.w_out_shared_DF.weight": ours["ffn.shared.down.weight"],
            }
        else:
            theirs |= {
                "feed_forward.mlp.layer_norm_weight": ours["ffn_norm.weight"],
                "feed_forward.mlp.fc1_weight": torch.cat([ours["ffn.gate.weight"], ours["ffn.up.weight"]]),
                "feed_forward.mlp.fc2_weight": ours["ffn.down.weight"],
            }
        out |= {f"layers.{layer}.{name}": tensor for name, tensor in theirs.items()}
    return out


def meta_model(meta: SimpleNamespace, config: ModelConfig, weights: dict[str, Tensor], num_tokens: int) -> Any:
    model = meta.model.Transformer(meta_args(meta, config, num_tokens)).float().eval()  # it makes its vision encoder in bfloat16
    model.load_state_dict(as_meta(config, weights), strict=True)
    return model


@torch.no_grad()
def meta_logits(meta: SimpleNamespace, reference: Any, config: ModelConfig, prompt: Prompt) -> Tensor:
    tokens, images = prompt.tokens[None], None
    if prompt.pixels is not None:
        mask = (tokens == config.patch_id)[..., None]
        hidden = torch.zeros(*tokens.shape, config.width)
        images = meta.datatypes.MaskedEmbedding(reference.vision_embeddings([[prompt.pixels]], mask, hidden), mask)
    return reference(meta.datatypes.TransformerInput(tokens=tokens, tokens_position=0, image_embedding=images)).logits[0]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits(meta: SimpleNamespace, case: str, seed: int) -> None:
    config = CASES[case]
    model = random_model(config, seed)
    reference = meta_model(meta, config, model.state_dict(), num_tokens=200)
    for num_text, num_tiles in ((1, 0), (16, 0), (57, 0), (35, 3), (200, 0)):
        prompt = random_prompt(config, num_text, num_tiles, seed)
        ours, theirs = packed_logits(model, [prompt]), meta_logits(meta, reference, config, prompt)
        assert theirs.std() > 0.5, "logits too flat to prove anything"
        assert (ours - theirs).abs().max() <= 1e-4
        assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_vision(meta: SimpleNamespace, seed: int) -> None:
    """Encoder, pixel shuffle and adapter on several tiles of two images, features put in order to the places of patch tokens."""
    config = CASES["scout"]
    model = random_model(config, seed)
    reference = meta_model(meta, config, model.state_dict(), num_tokens=1)
    prompt = random_prompt(config, 4, num_tiles=5, seed=seed)
    assert prompt.pixels is not None
    mask = (prompt.tokens == config.patch_id)[None, :, None]
    images = [[prompt.pixels[:2], prompt.pixels[2:]]]
    scattered = reference.vision_embeddings(images, mask, torch.zeros(1, len(prompt.tokens), 1))[0]
    ours = model.vision(prompt.pixels).flatten(0, 1)
    assert ours.std() > 0.1
    torch.testing.assert_close(scattered[mask[0, :, 0]], ours, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_tokens", [1, 16, 17, 50])
def test_chunk_mask(meta: SimpleNamespace, num_tokens: int) -> None:
    """The attention weights of a local layer, read off its output for one-hot values, are positive just where Meta's mask is."""
    q = k = torch.zeros(num_tokens, 1, num_tokens)
    weights = Packed([num_tokens], 16)(0, True, q, k, torch.eye(num_tokens)[:, None]).squeeze(1)
    assert torch.equal(weights > 0, meta.model.create_chunked_attention_mask(num_tokens, 16, torch.device("cpu")))
