"""GGUF's quantizations that herd has no kernels for: read exactly, and on a CPU turned into blocks near them, which is told."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch

from herd.checkpoint import rounding
from herd.checkpoint.convert import write
from herd.checkpoint.load import fill, load_model, open_source
from herd.checkpoint.quantize import quantize_checkpoint
from herd.checkpoint.source import Source, Stored, of_blocks
from herd.errors import CheckpointError
from herd.model.swap import BlocksExperts, BlocksLinear
from herd.ops.int4 import INT8, Kind, unpack_int4
from herd.ops.native import kernels
from tests.checkpoint.donor import WIDE_DONOR, llama_file
from tests.checkpoint.made import LLAMACPP, random_source
from tests.model.small import packed_logits, random_prompt

Type = gguf.GGMLQuantizationType
FOUR = Kind(4, 32, True)

# What a type becomes, and the most by which that moves weights: rms of the difference over rms of the weights.
NEAR = {
    Type.Q6_K: (INT8, 0.006),
    Type.Q5_K: (INT8, 0.006),
    Type.Q5_1: (INT8, 0.006),
    Type.Q5_0: (INT8, 0.006),
    Type.Q4_K: (FOUR, 0.0005),
    Type.IQ4_NL: (FOUR, 0.1),
    Type.IQ4_XS: (FOUR, 0.1),
    Type.Q3_K: (FOUR, 0.1),
    Type.Q2_K: (FOUR, 0.1),
}
native = pytest.mark.skipif(kernels() is None, reason="without native kernels everything is float32")


@pytest.mark.parametrize("type", NEAR, ids=lambda type: type.name)
def test_values_are_exact_and_blocks_are_near(type: gguf.GGMLQuantizationType, tmp_path: Path) -> None:
    expected = llama_file(tmp_path / "model.gguf", type, WIDE_DONOR)
    kind, most = NEAR[type]
    for name, stored in open_source(tmp_path / "model.gguf").tensors.items():
        assert torch.equal(stored.read(), expected[name]), name
        if len(stored.shape) == 1:
            continue
        assert (stored.kind, stored.rounded) == (None, type.name) and stored.near is not None
        near = of_blocks(stored.near)
        assert near.kind == kind
        difference = (near.read() - expected[name]).square().mean().sqrt() / expected[name].square().mean().sqrt()
        assert 0 < difference < most, name
        assert torch.equal(stored.near.rows(1, 3), stored.near.read()[1:3])


def test_q4_k_keeps_its_codes(tmp_path: Path) -> None:
    """Code c of a group is at c * scale - minimum: the groups' extremes and steps tell the codes."""
    expected = llama_file(tmp_path / "model.gguf", Type.Q4_K, WIDE_DONOR)["layers.0.ffn.up.weight"]
    stored = open_source(tmp_path / "model.gguf").tensors["layers.0.ffn.up.weight"]
    assert stored.near is not None
    codes, scale, minimum = unpack_int4(stored.near.read())
    assert minimum is not None
    groups = expected.unflatten(-1, (-1, 32)).double()
    least = codes.unflatten(-1, (-1, 32)).double()
    for a, b in ((0, 1), (5, 31), (30, 2)):  # differences of values are differences of codes
        assert torch.allclose(groups[..., a] - groups[..., b], (least[..., a] - least[..., b]) * scale.double(), rtol=2**-10, atol=1e-6)
    assert ((groups - (least * scale.double()[..., None] + minimum.double()[..., None])).abs() <= 2**-10 * groups.abs().amax() * 2).all()


def test_q4_k_with_a_factor_that_is_no_number(tmp_path: Path) -> None:
    llama_file(tmp_path / "model.gguf", Type.Q4_K, WIDE_DONOR)
    (t,) = (t for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors if t.name == "blk.0.attn_q.weight")
    with (tmp_path / "model.gguf").open("r+b") as file:
        file.seek(int(t.data_offset))
        file.write(b"\xff\x7f")
    near = open_source(tmp_path / "model.gguf").tensors["layers.0.attention.q.weight"].near
    assert near is not None
    with pytest.raises(CheckpointError, match=r"blk.0.attn_q.weight has scales that are not finite or too large for float16"):
        near.read()


def test_q6_k_with_a_factor_that_is_no_number(tmp_path: Path) -> None:
    llama_file(tmp_path / "model.gguf", Type.Q6_K, WIDE_DONOR)
    (t,) = (t for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors if t.name == "blk.0.attn_q.weight")
    with (tmp_path / "model.gguf").open("r+b") as file:
        file.seek(int(t.data_offset) + 208)
        file.write(b"\x00\x7e")
    near = open_source(tmp_path / "model.gguf").tensors["layers.0.attention.q.weight"].near
    assert near is not None
    with pytest.raises(CheckpointError, match=r"blk.0.attn_q.weight holds NaN or infinity"):
        near.read()


# --- models

MIXED = {"down.weight": Type.Q6_K, "embed.weight": Type.Q6_K, "attention.v.weight": Type.Q5_K, "attention.k.weight": Type.Q8_0}


@native
def test_a_file_of_many_types_runs_on_a_cpu(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As llama.cpp's Q4_K_M is: one line tells what became of what; on request everything is exact."""
    expected = llama_file(tmp_path / "model.gguf", Type.Q4_K, WIDE_DONOR, MIXED)
    prompt = random_prompt(replace(WIDE_DONOR, patch_id=WIDE_DONOR.vocab_size), 40)
    with caplog.at_level(logging.WARNING, logger="herd"), torch.no_grad():
        exact, source = load_model(tmp_path / "model.gguf", dtype=torch.float32)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in exact.state_dict().items())
        assert not caplog.records
        model, _ = load_model(tmp_path / "model.gguf")
        a, b = packed_logits(exact, [prompt]), packed_logits(model, [prompt])
    assert [record.getMessage() for record in caplog.records] == [
        "no kernels run these matrices as they are, so they are rounded once more while loading: 8 in Q4_K as int4 group 32 minimum, "
        "2 in Q5_K as int8 group 32, 3 in Q6_K as int8 group 32. "
        "dtype=torch.float32 loads them exactly, `herd quantize` does it once for good"
    ]
    assert all(isinstance(model.get_submodule(f"layers.0.attention.{part}"), BlocksLinear) for part in "qkvo")
    near = {name: of_blocks(stored.near) if stored.near else stored for name, stored in source.tensors.items()}
    with torch.no_grad():
        floats = packed_logits(fill(replace(source, tensors=near), torch.float32), [prompt])
    assert torch.allclose(b, floats, atol=0.02)
    assert (a - b).abs().mean() < 0.1 * a.std()  # random codes make a chaotic model
    assert sum(tensor.nbytes for tensor in model.state_dict().values()) < 0.25 * source.num_bytes


@native
def test_experts_become_blocks_all_three_or_none(caplog: pytest.LogCaptureFixture) -> None:
    """In pieces: no more than one expert is ever there in floats."""
    source = random_source(LLAMACPP)
    most = 0

    def rounded(name: str, stored: Stored, bits: float) -> Stored:
        def rows(start: int, stop: int) -> torch.Tensor:
            nonlocal most
            most = max(most, stop - start)
            return stored.rows(start, stop)

        return rounding.with_near(name, Stored(stored.shape, stored.dtype, rows, rounded=f"{bits:g} bits"), bits)

    change = {f"layers.1.ffn.experts.{part}": bits for part, bits in (("gate", 4.5), ("up", 4.5), ("down", 6.6))}
    change |= {"layers.3.ffn.experts.up": 4.5, "layers.1.ffn.router.weight": 4.5}
    tensors = {name: rounded(name, t, change[name]) if name in change else t for name, t in source.tensors.items()}
    with caplog.at_level(logging.WARNING, logger="herd"):
        model = fill(replace(source, tensors=tensors), torch.float32, holds_blocks=True)
    assert most == 1 or most == LLAMACPP.num_experts  # the router has three rows
    assert isinstance(model.get_submodule("layers.1.ffn.experts"), BlocksExperts)
    assert not isinstance(model.get_submodule("layers.3.ffn.experts"), BlocksExperts)
    assert torch.equal(model.state_dict()["layers.1.ffn.router.weight"], source.tensors["layers.1.ffn.router.weight"].read())
    assert "2 in 4.5 bits as int4 group 32 minimum, 1 in 6.6 bits as int8 group 32" in caplog.text


def test_what_does_not_divide_stays_in_floats() -> None:
    stored = Stored((12, 64), torch.float32, lambda a, b: torch.ones(b - a, 64), rounded="Q9")
    assert rounding.with_near("x", stored, 4) is stored


# --- the verbs


def test_quantize_keeps_the_codes_where_it_can(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    llama_file(tmp_path / "model.gguf", Type.Q4_K, WIDE_DONOR, {"embed.weight": Type.Q6_K})
    with caplog.at_level(logging.WARNING, logger="herd"):
        errors = quantize_checkpoint(tmp_path / "model.gguf", tmp_path / "kept", with_minimum=True)
    warning = "the weights are quantized already (Q4_K, Q6_K); quantizing them again adds to their error"
    assert [record.getMessage() for record in caplog.records] == [warning]
    assert errors["dense", "int4 group 32 minimum"].num_tensors == 6
    source, back = open_source(tmp_path / "model.gguf"), open_source(tmp_path / "kept")
    for name in ("layers.0.ffn.up.weight", "layers.1.attention.q.weight"):
        before, after = source.tensors[name].near, back.tensors[name].blocks
        assert before is not None and after is not None and torch.equal(before.read(), after.read())
    anew = quantize_checkpoint(tmp_path / "model.gguf", tmp_path / "anew")
    assert errors["attention", "int4 group 32 minimum"].relative[0] < 0.0005 < 0.03 < anew["attention", "int4 group 32"].relative[0]
    assert (errors["embedding", "int8 group 32"].relative[0]) < 0.006


def test_convert_tells_of_codes_that_become_floats(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    llama_file(tmp_path / "model.gguf", Type.Q4_K, WIDE_DONOR, MIXED)
    source: Source = open_source(tmp_path / "model.gguf")
    with caplog.at_level(logging.WARNING, logger="herd"):
        write(source, tmp_path / "herd", "herd")
        assert "the format herd has no place for the codes of Q4_K, Q5_K, Q6_K: such matrices are written as float32" in caplog.text
        caplog.clear()
        write(source, tmp_path / "floats", "herd", dtype=torch.float32)
        assert not caplog.records
    assert json.loads((tmp_path / "herd" / "herd.json").read_text())["quantization"] == ["int8 group 32"]
    for name, stored in source.tensors.items():
        assert torch.equal(stored.read(), open_source(tmp_path / "herd").tensors[name].read()), name
