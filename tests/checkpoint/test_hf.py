"""Hugging Face's format, held against transformers itself."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, Llama4ForCausalLM, Llama4ForConditionalGeneration
from transformers.utils import logging as transformers_logging

from herd.checkpoint import hf
from herd.checkpoint.convert import write
from herd.checkpoint.load import load_model, open_source
from herd.errors import CheckpointError
from herd.model.config import ModelConfig, RopeScaling
from herd.model.presets import PRESETS
from herd.text.tokenizer import load_tokenizer
from tests.checkpoint.made import DENSE, FAMILY, MAVERICK, SCOUT, assert_same, entries, indexed, random_source
from tests.model.small import packed_logits, random_prompt
from tests.model.transformers_model import transformers_config

transformers_logging.set_verbosity_error()  # it warns of Scout's own RoPE scaling, where low == high
transformers_logging.disable_progress_bar()

TEXT_ONLY = replace(SCOUT, vision=None)


@pytest.mark.parametrize("config", [*FAMILY.values(), replace(TEXT_ONLY, tied=True)], ids=[*FAMILY, "tied text"])
@pytest.mark.parametrize("shard_bytes", [10**9, 30_000], ids=["one file", "many files"])
def test_there_and_back_is_the_same_bit_for_bit(config: ModelConfig, shard_bytes: int, tmp_path: Path) -> None:
    source = indexed(config)
    write(source, tmp_path / "hf", "hf", shard_bytes=shard_bytes)
    assert ("model.safetensors.index.json" in entries(tmp_path / "hf")) == (shard_bytes < 10**9)
    back = open_source(tmp_path / "hf")
    expected = config if config.vision else replace(config, patch_id=200092)  # no place for it, and no use
    assert back.config == expected
    assert back.files.items() >= source.files.items()
    assert_same(source, back)
    write(back, tmp_path / "herd", "herd")
    assert_same(source, open_source(tmp_path / "herd"))


@pytest.mark.parametrize("config", [SCOUT, MAVERICK], ids=["scout", "maverick"])
def test_transformers_loads_what_we_write_and_computes_the_same(config: ModelConfig, tmp_path: Path) -> None:
    write(random_source(config), tmp_path / "hf", "hf", shard_bytes=100_000)
    theirs, info = Llama4ForConditionalGeneration.from_pretrained(tmp_path / "hf", output_loading_info=True, dtype=torch.float32)
    assert not any(info.values()), info
    ours, _ = load_model(tmp_path / "hf")
    prompt = random_prompt(config, 60, num_tiles=2)
    with torch.no_grad():
        expected = theirs(input_ids=prompt.tokens[None], pixel_values=prompt.pixels).logits[0]
        actual = packed_logits(ours, [prompt])
    assert expected.std() > 0.5
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_transformers_loads_our_text_model(tmp_path: Path) -> None:
    config = replace(SCOUT, vision=None, tied=True)
    write(random_source(config), tmp_path / "hf", "hf")
    theirs, info = Llama4ForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True, dtype=torch.float32)
    assert not any(info.values()), info
    ours, _ = load_model(tmp_path / "hf")
    prompt = random_prompt(config, 60)
    with torch.no_grad():
        torch.testing.assert_close(packed_logits(ours, [prompt]), theirs(input_ids=prompt.tokens[None]).logits[0], atol=1e-4, rtol=1e-4)


def test_transformers_reads_the_same_facts(tmp_path: Path) -> None:
    write(indexed(SCOUT), tmp_path / "hf", "hf")
    config = AutoConfig.from_pretrained(tmp_path / "hf")
    text, vision = config.text_config, config.vision_config
    assert (text.hidden_size, text.intermediate_size, text.intermediate_size_mlp) == (48, 24, 56)
    assert (text.num_attention_heads, text.num_key_value_heads, text.head_dim) == (16, 8, 8)
    assert (text.no_rope_layers, text.layer_types[2:]) == ([1, 1, 1, 0], ["chunked_attention", "full_attention"])
    assert (text.num_local_experts, text.moe_layers, text.use_qk_norm) == (3, [0, 1, 2, 3], True)
    assert (text.attention_chunk_size, text.floor_scale, text.attn_scale) == (16, 8, 0.1)
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0}
    assert text.rope_parameters == rope | {"original_max_position_embeddings": 8192}
    assert (text.bos_token_id, text.eos_token_id, text.pad_token_id) == (256, [257, 260, 261], 262)
    assert (vision.hidden_size, vision.intermediate_size, vision.image_size, vision.vision_output_dim) == (32, 128, 24, 24)
    assert (config.image_token_index, config.dtype) == (268, torch.float32)


@pytest.mark.parametrize("config", [SCOUT, MAVERICK], ids=["scout", "maverick"])
def test_what_transformers_saves_loads_here(config: ModelConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = Llama4ForConditionalGeneration(transformers_config(config)).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.copy_(1 + 0.1 * torch.randn_like(p) if "norm" in name and name.endswith("weight") else 0.15 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    assert "model.safetensors.index.json" in entries(tmp_path)
    ours, source = load_model(tmp_path)
    assert replace(source.config, bos_id=256, stop_ids=config.stop_ids, pad_id=262) == config
    prompt = random_prompt(config, 60, num_tiles=1)
    with torch.no_grad():
        expected = theirs(input_ids=prompt.tokens[None], pixel_values=prompt.pixels).logits[0]
        torch.testing.assert_close(packed_logits(ours, [prompt]), expected, atol=1e-4, rtol=1e-4)


def test_what_transformers_saves_of_a_text_model_loads_here(tmp_path: Path) -> None:
    config = transformers_config(SCOUT).text_config
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    theirs = Llama4ForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    ours, _ = load_model(tmp_path)
    prompt = random_prompt(SCOUT, 60)
    with torch.no_grad():
        torch.testing.assert_close(packed_logits(ours, [prompt]), theirs(input_ids=prompt.tokens[None]).logits[0], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_transformers_reads_a_tokenizer_that_was_metas(tmp_path: Path) -> None:
    """Meta's tokenizer.model becomes a tokenizer.json with the same ids."""
    llama_models = pytest.importorskip("llama_models", reason="llama-models, which holds the real tokenizer, is not installed")
    model = Path(llama_models.__path__[0], "llama4", "tokenizer.model").read_bytes()
    source = replace(indexed(replace(TEXT_ONLY, bos_id=200000, stop_ids=(200008,))), files={"tokenizer.model": model})
    write(source, tmp_path / "hf", "hf")
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "hf"), load_tokenizer(tmp_path / "hf")
    text = "The Llama herd, 2025: grüß dich! 你好  \n\n\tdef f(x): return x**2  # 123456 don't"
    assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
    assert len(ours.encode(text)) > 20
    assert (theirs.convert_tokens_to_ids("<|eot|>"), theirs.eos_token_id, theirs.bos_token_id) == (200008, 200008, 200000)


# --- config.json


def test_the_released_scout_is_the_preset() -> None:
    """The body of the released file, corrected RoPE scaling and all. Source: config.json of Llama-4-Scout-17B-16E-Instruct."""
    text = {
        "_attn_implementation_autoset": True,
        "attention_bias": False,
        "attention_chunk_size": 8192,
        "attention_dropout": 0.0,
        "attn_scale": 0.1,
        "attn_temperature_tuning": True,
        "bos_token_id": 200000,
        "eos_token_id": [200001, 200007, 200008],
        "floor_scale": 8192,
        "for_llm_compressor": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 5120,
        "initializer_range": 0.02,
        "interleave_moe_layer_step": 1,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "max_position_embeddings": 10485760,
        "model_type": "llama4_text",
        "no_rope_layers": [],
        "num_attention_heads": 40,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "num_local_experts": 16,
        "output_router_logits": False,
        "pad_token_id": 200018,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 16.0,
            "high_freq_factor": 1.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_qk_norm": True,
        "vocab_size": 202048,
    }
    vision = {
        "attention_dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_size": 1408,
        "image_size": 336,
        "initializer_range": 0.02,
        "intermediate_size": 5632,
        "model_type": "llama4_vision_model",
        "multi_modal_projector_bias": False,
        "norm_eps": 1e-05,
        "num_attention_heads": 16,
        "num_channels": 3,
        "num_hidden_layers": 34,
        "patch_size": 14,
        "pixel_shuffle_ratio": 0.5,
        "projector_dropout": 0.0,
        "projector_input_dim": 4096,
        "projector_output_dim": 4096,
        "rope_theta": 10000,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "vision_output_dim": 4096,
    }
    outer = {"model_type": "llama4", "image_token_index": 200092, "boi_token_index": 200080, "eoi_token_index": 200081}
    data = {**outer, "architectures": ["Llama4ForConditionalGeneration"], "text_config": text, "vision_config": vision}
    assert hf.read_config(data, {}, {}, "config.json") == PRESETS["scout"]
    other = {"max_position_embeddings": 1048576, "num_local_experts": 128, "interleave_moe_layer_step": 2}
    maverick = {**text, **other, "rope_scaling": None, "use_qk_norm": False}
    assert hf.read_config({**data, "text_config": maverick}, {}, {}, "config.json") == PRESETS["maverick"]


def config_json(**changes: Any) -> dict[str, Any]:
    """A released config in our spelling; `text__key` and `vision__key` change the inner ones, a value of ... takes a key away."""
    data, _ = hf.write_config(SCOUT, torch.bfloat16)
    for key, value in changes.items():
        inner, _, name = key.rpartition("__")
        target = data[f"{inner}_config"] if inner else data
        if value is ...:
            del target[name]
        else:
            target[name] = value
    return data


def read(**changes: Any) -> ModelConfig:
    return hf.read_config(config_json(**changes), {}, {}, "config.json")


def test_both_spellings_of_rope_are_read() -> None:
    scaling = config_json()["text_config"]["rope_scaling"]
    new = {"rope_theta": 500000.0, **scaling}
    assert read(text__rope_theta=..., text__rope_scaling=..., text__rope_parameters=new) == SCOUT
    plain = {"rope_theta": 1000.0, "rope_type": "default"}
    assert read(text__rope_theta=..., text__rope_scaling=..., text__rope_parameters=plain).rope_scaling is None
    assert read(text__rope_theta=..., text__rope_scaling=..., text__rope_parameters=plain).rope_theta == 1000.0
    with pytest.raises(CheckpointError, match=r"RoPE scaling of type 'yarn' is not supported"):
        read(text__rope_scaling={"rope_type": "yarn", "factor": 4.0})


def test_the_released_way_to_leave_things_out_is_read() -> None:
    """As released: an empty no_rope_layers, no layer_types, no moe_layers, temperature tuning as an int."""
    released = {"text__no_rope_layers": [], "text__layer_types": ..., "text__moe_layers": ..., "text__attn_temperature_tuning": 4}
    assert read(**released) == SCOUT
    assert read(**released, text__interleave_moe_layer_step=2).moe_step == 2
    assert read(**released, text__attention_chunk_size=None).chunk_tokens is None


def test_the_stop_ids_of_generation_config_rule() -> None:
    assert hf.read_config(config_json(), {"eos_token_id": [1, 2]}, {}, "x").stop_ids == (1, 2)
    assert read(text__eos_token_id=7).stop_ids == (7,)


def test_scouts_first_rope_scaling_is_mended_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wrong = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_tokens=8192)
    scout = replace(SCOUT, num_experts=16, rope_scaling=wrong)
    with caplog.at_level(logging.WARNING, logger="herd"):
        write(indexed(scout), tmp_path / "hf", "hf")
        assert open_source(tmp_path / "hf").config.rope_scaling == RopeScaling(
            factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0, original_tokens=8192
        )
    assert "RoPE scaling 8/1/4 is the mistake of Scout's first release; using 16/1/1 instead" in caplog.text


def test_another_scaling_of_a_scout_is_kept_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = RopeScaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0)
    scout = replace(SCOUT, num_experts=16, rope_scaling=other)
    with caplog.at_level(logging.WARNING, logger="herd"):
        write(indexed(scout), tmp_path / "hf", "hf")
        assert open_source(tmp_path / "hf").config.rope_scaling == other
    assert "RoPE scaling 32/1/4, original context 8192; Scout has 16/1/1, 8192. Kept as it is" in caplog.text


def test_unknown_keys_are_named_in_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="herd"):
        read(novel=1, text__sliding=2, vision__blur=3, text__use_cache=True, text__router_aux_loss_coef=0.1)
    assert [r.getMessage() for r in caplog.records] == [
        "config.json: unknown keys are ignored: novel, text_config.sliding, vision_config.blur"
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, r"model_type 'mistral' \(Llama4ForConditionalGeneration\) is not supported\nhint: herd reads llama4"),
        ({"text__attention_bias": True}, "attention_bias = True is not supported\nhint: herd computes attention_bias = False only"),
        ({"text__hidden_act": "relu"}, "hidden_act = 'relu' is not supported"),
        ({"vision__hidden_act": "quick_gelu"}, "hidden_act = 'quick_gelu' is not supported"),
        ({"text__no_rope_layers": [1, 0, 0, 1]}, r"no_rope_layers is irregular: \[1, 0, 0, 1\]"),
        ({"text__no_rope_layers": [1, 0]}, "no_rope_layers has 2 entries for 4 layers"),
        ({"text__moe_layers": [0, 3]}, r"moe_layers \[0, 3\] is not every 1th of 4 layers"),
        ({"text__layer_types": ["full_attention", *["chunked_attention"] * 3]}, "layer_types does not follow no_rope_layers"),
        ({"vision__intermediate_size": 64}, r"the vision intermediate_size 64 is not hidden_size 32 \* 2\^2"),
        ({"vision__vision_output_dim": 7680}, "projector_input_dim 24, projector_output_dim 24 and vision_output_dim 7680 differ"),
    ],
)
def test_what_is_not_supported_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(**changes)


def test_a_model_that_config_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    assert SCOUT.vision is not None
    wide = replace(SCOUT, vision=replace(SCOUT.vision, hidden_width=64))
    with pytest.raises(CheckpointError, match=r"the vision intermediate_size 64 is not hidden_size 32"):
        write(indexed(wide), tmp_path / "hf", "hf")
    assert entries(tmp_path) == []


def test_prefixes_of_names_come_and_go() -> None:
    for name in ("model.language_model.layers.0.x", "model.language_model.model.layers.0.x", "model.layers.0.x"):
        assert hf._plain_name(name) == "language_model.model.layers.0.x"
    assert hf._plain_name("lm_head.weight") == hf._plain_name("model.language_model.lm_head.weight") == "language_model.lm_head.weight"
    assert hf._plain_name("model.vision_model.class_embedding") == "vision_model.class_embedding"


def test_the_dense_guard_is_read(tmp_path: Path) -> None:
    """As converted by Meta's script: no experts, a step of 0, every layer with RoPE, no chunk."""
    write(indexed(DENSE), tmp_path / "hf", "hf")
    path = tmp_path / "hf" / "config.json"
    data = json.loads(path.read_text())
    del data["layer_types"]
    path.write_text(json.dumps({**data, "interleave_moe_layer_step": 0, "num_experts_per_tok": 0}))
    assert open_source(tmp_path / "hf").config == replace(DENSE, patch_id=200092)
