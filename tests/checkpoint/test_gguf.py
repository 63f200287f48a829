"""GGUF, held against llama.cpp (or what it once computed) and against the `gguf` package."""

import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from herd.checkpoint.convert import write
from herd.checkpoint.gguf import _divisors
from herd.checkpoint.load import fill, load_model, open_source
from herd.checkpoint.quantize import quantized
from herd.checkpoint.source import Source, of_blocks
from herd.errors import CheckpointError
from herd.model.config import ModelConfig, RopeScaling
from herd.model.presets import CRIA
from herd.ops.attend import Packed
from herd.ops.int4 import Kind
from herd.text.tokenizer import bpe_json, byte_tokenizer, load_tokenizer
from tests.checkpoint.donor import DONOR, llama_file
from tests.checkpoint.golden.make_llamacpp import PATH, run
from tests.checkpoint.made import LLAMACPP, SCOUT, WIDE, assert_same, entries, indexed, random_source

Type = gguf.GGMLQuantizationType
MAVERICK = replace(LLAMACPP, num_experts=128, rope_scaling=None, qk_norm=False, hidden_width=8)


def with_merges(source: Source) -> Source:
    """A source whose tokenizer has two merges: "ab", and "abc" after it."""
    plain = json.loads(byte_tokenizer().files()["tokenizer.json"])
    tokens = list(plain["model"]["vocab"])[:256]
    names = {t["content"]: t["id"] for t in plain["added_tokens"]}
    after = [*tokens, *names, "ab", "abc"]
    return replace(source, files={"tokenizer.json": bpe_json(after, ["a b", "ab c"], pre="gpt-2", specials=names)})


# --- writing


@pytest.mark.parametrize("config", [LLAMACPP, replace(MAVERICK, tied=True)], ids=["scout", "maverick, tied"])
def test_there_and_back_is_the_same_bit_for_bit(config: ModelConfig, tmp_path: Path) -> None:
    source = with_merges(indexed(config))
    write(source, tmp_path / "model.gguf", "gguf")
    back = open_source(tmp_path / "model.gguf")
    assert back.config == config
    assert_same(source, back)
    ours, theirs = load_tokenizer_of(source, tmp_path), load_tokenizer_of(back, tmp_path)
    assert ours.encode("abcab <|eot|>") == theirs.encode("abcab <|eot|>")
    assert ours.specials == theirs.specials


def load_tokenizer_of(source: Source, tmp_path: Path) -> Any:
    for name, content in source.files.items():
        (tmp_path / name).write_bytes(content)
    return load_tokenizer(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_floats_stay_and_norms_and_routers_are_full(dtype: torch.dtype, tmp_path: Path) -> None:
    source = random_source(LLAMACPP).to(dtype)
    write(source, tmp_path / "model.gguf", "gguf")
    back = open_source(tmp_path / "model.gguf")
    for name, stored in back.tensors.items():
        assert stored.dtype == (torch.float32 if "norm" in name or "router" in name else dtype)
        assert torch.equal(stored.read(), source.tensors[name].read().to(stored.dtype))


def test_the_file_is_as_the_gguf_package_reads_it(tmp_path: Path) -> None:
    write(with_merges(random_source(LLAMACPP)), tmp_path / "model.gguf", "gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    shapes = {t.name: tuple(int(n) for n in reversed(t.shape)) for t in reader.tensors}
    assert shapes["blk.1.ffn_gate_exps.weight"] == (3, 96, 64)
    assert shapes["blk.1.ffn_down_exps.weight"] == (3, 64, 96)
    assert shapes["blk.1.ffn_gate_inp.weight"] == (3, 64)
    assert shapes["blk.0.ffn_down.weight"] == (64, 128)
    assert shapes["rope_freqs.weight"] == (8,)
    assert reader.fields["llama4.interleave_moe_layer_step"].contents() == 2
    assert reader.fields["tokenizer.ggml.merges"].contents() == ["a b", "ab c"]
    assert reader.fields["tokenizer.ggml.tokens"].contents()[256] == "<|begin_of_text|>"
    assert (reader.fields["tokenizer.ggml.token_type"].contents()[256:258], len(shapes)) == ([3, 3], 4 * 6 + 2 * 7 + 2 * 3 + 3 + 1)


def test_vision_is_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="herd"):
        write(indexed(replace(LLAMACPP, vision=SCOUT.vision)), tmp_path / "model.gguf", "gguf")
    assert "a GGUF model file holds text only: 42 vision tensors (vision.cls, ...) are left out" in caplog.text
    assert open_source(tmp_path / "model.gguf").config.vision is None


def test_what_llama_cpp_cannot_compute_is_listed(tmp_path: Path) -> None:
    strange = replace(LLAMACPP, chunk_tokens=16, temperature_floor=8, qk_norm=False, global_step=2)
    with pytest.raises(CheckpointError) as caught:
        write(indexed(strange), tmp_path / "model.gguf", "gguf")
    assert caught.value.message == (
        "llama.cpp's llama4 cannot express this model: global_step is 2 (there 4); chunk_tokens is 16 (there 8192); "
        "qk_norm is False (there True); temperature_floor is 8 (there 8192)"
    )
    with pytest.raises(CheckpointError, match=r"llama4 architecture has no dense models, .*\nhint: --to herd and --to hf write it"):
        write(indexed(replace(LLAMACPP, num_experts=0)), tmp_path / "model.gguf", "gguf")
    with pytest.raises(CheckpointError, match=r"rope_freqs.weight is no Llama 3 scaling"):
        write(indexed(replace(LLAMACPP, rope_scaling=RopeScaling(original_tokens=64))), tmp_path / "model.gguf", "gguf")
    assert entries(tmp_path) == []


# --- llama.cpp


def test_llama_cpp_runs_our_file(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; the golden test below stands in")
    golden = json.loads(PATH.read_text())
    write(random_source(LLAMACPP), tmp_path / "model.gguf", "gguf")
    for step, expected in zip(run(tmp_path / "model.gguf", golden["prompt"]), golden["steps"], strict=True):
        assert step["ids"] == expected["ids"]
        np.testing.assert_allclose(step["logits"], expected["logits"], atol=1e-3)


def test_llama_cpp_reads_our_tokenizer(tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    source = with_merges(random_source(LLAMACPP))
    write(source, tmp_path / "model.gguf", "gguf")
    llama = llama_cpp.Llama(str(tmp_path / "model.gguf"), vocab_only=True, verbose=False)
    text = "abc abcab, grüß dich ab"
    assert llama.tokenize(text.encode(), add_bos=False, special=False) == load_tokenizer_of(source, tmp_path).encode(text)
    assert llama.tokenize(b"<|eot|>", add_bos=False, special=True) == [261]
    llama.close()


def test_our_forward_is_what_llama_cpp_computed(tmp_path: Path) -> None:
    golden = json.loads(PATH.read_text())
    write(random_source(LLAMACPP), tmp_path / "model.gguf", "gguf")
    model, source = load_model(tmp_path / "model.gguf")
    steps = golden["steps"]
    tokens = torch.tensor(golden["prompt"] + [step["ids"][0] for step in steps[:-1]])
    with torch.no_grad():
        logits = model(tokens, torch.arange(len(tokens)), Packed([len(tokens)], source.config.chunk_tokens))[-len(steps) :]
    top = logits.topk(len(steps[0]["ids"]))
    assert top.indices.tolist() == [step["ids"] for step in steps]
    torch.testing.assert_close(top.values, torch.tensor([step["logits"] for step in steps]), atol=1e-3, rtol=0)


# --- blocks


@pytest.mark.parametrize("with_minimum", [False, True], ids=["Q4_0", "Q4_1"])
def test_blocks_are_written_as_they_are(with_minimum: bool, tmp_path: Path) -> None:
    """And the gguf package finds the values that herd's blocks have."""
    source = quantized(random_source(LLAMACPP), 32, with_minimum)
    write(source, tmp_path / "model.gguf", "gguf")
    back = open_source(tmp_path / "model.gguf")
    write(back, tmp_path / "again.gguf", "gguf")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "model.gguf").read_bytes()
    for name, stored in source.tensors.items():
        assert stored.kind == back.tensors[name].kind, name
        if stored.blocks is not None:
            assert torch.equal(stored.blocks.read(), back.tensors[name].blocks.read()), name
            assert torch.equal(of_blocks(stored.blocks).read(), back.tensors[name].read()), name
    tensors = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    four = "Q4_1" if with_minimum else "Q4_0"
    assert (tensors["blk.1.ffn_down_exps.weight"], tensors["blk.0.attn_q.weight"], tensors["token_embd.weight"]) == (four, four, "Q8_0")
    assert (tensors["blk.1.ffn_gate_inp.weight"], tensors["output_norm.weight"], tensors["output.weight"]) == ("F32", "F32", "Q8_0")


def test_groups_of_128_become_four_of_the_same_scale(tmp_path: Path) -> None:
    source = quantized(random_source(WIDE), 128)
    write(source, tmp_path / "model.gguf", "gguf")
    back = open_source(tmp_path / "model.gguf")
    name = "layers.1.ffn.experts.down"
    assert (source.tensors[name].kind, back.tensors[name].kind) == (Kind(4, 128), Kind(4, 32))
    assert torch.equal(of_blocks(source.tensors[name].blocks).read(), back.tensors[name].read())


def test_the_code_that_no_quantizer_writes_is_refused(tmp_path: Path) -> None:
    llama_file(tmp_path / "model.gguf", Type.Q8_0)
    stored = open_source(tmp_path / "model.gguf").tensors["layers.0.attention.q.weight"]
    assert stored.blocks is not None
    (t,) = (t for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors if t.name == "blk.0.attn_q.weight")
    with (tmp_path / "model.gguf").open("r+b") as file:
        file.seek(int(t.data_offset) + 2 + 5)
        file.write(b"\x80")
    assert stored.read()[0, 5] < 0  # as a float it is fine
    with pytest.raises(CheckpointError, match=r"blk.0.attn_q.weight has the 8-bit code -128, .*\nhint: convert with --dtype float32"):
        stored.blocks.read()


def test_llama_cpp_computes_the_same_from_blocks(tmp_path: Path) -> None:
    """It rounds activations to 8 bits, which moves logits. On the same weights as floats it rounds nothing, and agrees."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; the gguf package reads the file in the tests above")
    write(quantized(random_source(WIDE)), tmp_path / "blocks.gguf", "gguf")
    source = open_source(tmp_path / "blocks.gguf").to(torch.float32)
    write(source, tmp_path / "floats.gguf", "gguf")
    model = fill(source, torch.float32)
    prompt = json.loads(PATH.read_text())["prompt"]
    for name, most in (("blocks", 0.05), ("floats", 1e-4)):
        steps = run(tmp_path / f"{name}.gguf", prompt)
        tokens = torch.tensor(prompt + [step["ids"][0] for step in steps[:-1]])
        with torch.no_grad():
            logits = model(tokens, torch.arange(len(tokens)), Packed([len(tokens)], source.config.chunk_tokens))[-len(steps) :]
        moved = (logits.gather(1, torch.tensor([step["ids"] for step in steps])) - torch.tensor([step["logits"] for step in steps])).abs()
        assert moved.mean() < most * logits.std()  # codes in another order would move them by about 1
        assert (logits.amax(-1) - logits.gather(1, torch.tensor([step["ids"][:1] for step in steps]))[:, 0]).max() <= moved.max()


# --- reading what others write

BLOCKS = {Type.Q4_0: Kind(4, 32), Type.Q4_1: Kind(4, 32, True), Type.Q8_0: Kind(8, 32)}


@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_1, Type.F16, Type.BF16], ids=lambda kind: kind.name)
def test_a_dense_llama_is_read_exactly_whatever_its_type(kind: gguf.GGMLQuantizationType, tmp_path: Path) -> None:
    expected = llama_file(tmp_path / "model.gguf", kind)
    source = open_source(tmp_path / "model.gguf")
    assert source.config == DONOR
    assert source.files.keys() == {"tokenizer.json", "chat_template.jinja"}
    for name, stored in source.tensors.items():
        assert torch.equal(stored.read().float(), expected[name]), name
        assert torch.equal(stored.rows(3, 17).float(), expected[name][3:17]), name
        assert stored.kind == (BLOCKS.get(kind) if len(stored.shape) == 2 else None)
        assert stored.rounded == (kind.name if kind == Type.Q5_1 and len(stored.shape) == 2 else "")
        if stored.blocks is not None:
            assert torch.equal(of_blocks(stored.blocks).read(), expected[name]), name
            assert torch.equal(of_blocks(stored.blocks).rows(3, 17), expected[name][3:17]), name
            assert torch.equal(stored.blocks.rows(1, 3), stored.blocks.read()[1:3]), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "qwen2"}, "holds a qwen2 model\nhint: herd reads the architectures llama4 and \\(dense\\) llama"),
        ({"llama.expert_count": 8}, "expert_count = 8, which herd does not compute"),
        ({"llama.rope.scaling.type": "yarn"}, "rope.scaling.type = yarn, which herd does not compute"),
        ({"tokenizer.chat_template": "[INST]"}, "a llama model whose chat template is not ChatML"),
        ({"llama.context_length": ...}, "does not say llama.context_length"),
        ({"tokenizer.ggml.model": "llama"}, "the tokenizer is llama, not byte-level BPE"),
    ],
)
def test_other_models_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    llama_file(tmp_path / "model.gguf", Type.F16, **changes)
    with pytest.raises(CheckpointError, match=message):
        open_source(tmp_path / "model.gguf")


def test_a_cut_file_is_named(tmp_path: Path) -> None:
    llama_file(tmp_path / "model.gguf", Type.F16)
    os.truncate(tmp_path / "model.gguf", (tmp_path / "model.gguf").stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"is cut short or broken"):
        open_source(tmp_path / "model.gguf")


def test_a_part_that_is_not_there_is_named(tmp_path: Path) -> None:
    llama_file(tmp_path / "model-00001-of-00002.gguf", Type.F16)
    with pytest.raises(CheckpointError, match=r"lacks 1 of 2 parts of the model: model-00002-of-00002.gguf"):
        open_source(tmp_path)


def test_rope_divisors_are_those_of_llama_cpps_converter() -> None:
    """Source: llama.cpp, conversion/llama.py, generate_extra_tensors; for Scout: 35 pairs as they are, 29 by 16."""
    assert _divisors(128, 500000.0, RopeScaling()).tolist() == [1.0] * 35 + [16.0] * 29


@pytest.mark.weights
def test_the_donor_is_the_preset(donor_gguf: Path) -> None:
    source = open_source(donor_gguf)
    assert replace(source.config, advised_temperature=CRIA.advised_temperature, advised_top_p=CRIA.advised_top_p) == CRIA
    assert (len(source.tensors), source.num_bytes, source.packed_bytes) == (272, 538_060_032, 96_576_768)
