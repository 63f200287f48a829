"""Quantized checkpoints in herd's own format: made, read back, refused when they are not whole."""

import json
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from herd.checkpoint import save
from herd.checkpoint.convert import write
from herd.checkpoint.load import load_model, open_source
from herd.checkpoint.quantize import quantize_checkpoint, quantized
from herd.checkpoint.source import Source, of_blocks
from herd.cli.main import main
from herd.errors import CheckpointError, ResourceError
from herd.model.config import ModelConfig
from herd.model.presets import TINY
from herd.ops.int4 import INT8, Kind, dequantize
from herd.quant.int4 import part_of, plan, quantize
from tests.checkpoint.donor import llama_file
from tests.checkpoint.made import LLAMACPP, SCOUT, WIDE, assert_same, entries, indexed, random_source
from tests.model.small import packed_logits, random_prompt

KINDS = {"32": (32, False), "32 minimum": (32, True), "128": (128, False), "128 minimum": (128, True)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A quantized checkpoint in herd's own format."""
    write(quantized(random_source(LLAMACPP)), tmp_path / "model", "herd")
    return tmp_path / "model"


# --- there and back


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_blocks_are_stored_and_read_back(options: tuple[int, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("herd.checkpoint.source.PIECE_BYTES", 20_000)
    source = random_source(WIDE)
    made = quantized(source, *options)
    write(made, tmp_path / "model", "herd", shard_bytes=100_000)
    back = open_source(tmp_path / "model")
    planned = plan({name: stored.shape for name, stored in source.tensors.items()}, *options)
    for name, stored in back.tensors.items():
        kind = planned.kinds.get(name)
        assert (stored.kind, stored.shape) == (kind, source.tensors[name].shape)
        if stored.blocks is None:
            assert torch.equal(stored.read(), source.tensors[name].read())
            continue
        assert kind is not None and stored.blocks.view is not None
        expected = quantize(source.tensors[name].read(), kind)
        assert torch.equal(stored.blocks.read(), expected) and torch.equal(stored.blocks.view(), expected)
        assert torch.equal(stored.read(), dequantize(expected))
        last = stored.shape[0] - 1  # rows that are no whole blocks
        assert torch.equal(stored.rows(1, last), dequantize(expected)[1:last])
    assert back.packed_bytes == sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors")) - headers(
        tmp_path / "model"
    )
    assert back.packed_bytes < 0.3 * back.num_bytes
    write(back, tmp_path / "again", "herd", shard_bytes=100_000)
    for name in entries(tmp_path / "model"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


def headers(folder: Path) -> int:
    """Bytes of the headers of all safetensors files."""
    return sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("config", [LLAMACPP, replace(LLAMACPP, tied=True), replace(TINY, chunk_tokens=16)], ids=["text", "tied", "tiny"])
def test_the_model_computes_with_the_values_of_the_codes(config: ModelConfig, tmp_path: Path) -> None:
    source = random_source(config)
    write(quantized(source), tmp_path / "model", "herd")
    model, opened = load_model(tmp_path / "model", dtype=torch.float32)
    expected, _ = load_model(write_floats(opened, tmp_path / "floats"))
    prompt = random_prompt(config, 40, num_tiles=1 if config.vision else 0)
    with torch.no_grad():
        exact = packed_logits(model, [prompt])
        assert torch.allclose(exact, packed_logits(expected, [prompt]), atol=1e-4)
        unrounded, _ = load_model(write_floats(source, tmp_path / "unrounded"))
        assert not torch.allclose(exact, packed_logits(unrounded, [prompt]), atol=1e-2)
    assert opened.tensors["embed.weight"].kind == INT8  # tied or not


def write_floats(source: Source, place: Path) -> Path:
    write(source, place, "herd", dtype=torch.float32)
    assert all(stored.kind is None for stored in open_source(place).tensors.values())
    return place


def test_floats_come_out_on_request(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("herd.log.log.handlers", [])  # leaves the logger as it was
    monkeypatch.setattr("herd.log.log.propagate", True)
    assert main(["convert", str(folder), str(tmp_path / "floats"), "--to", "herd", "--dtype", "float32"]) == 0
    assert "quantization" not in json.loads((tmp_path / "floats" / save.CONFIG).read_text())
    for name, stored in open_source(tmp_path / "floats").tensors.items():
        assert torch.equal(stored.read(), open_source(folder).tensors[name].read())


def test_every_format_takes_a_quantized_checkpoint(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GGUF keeps all blocks, Hugging Face int4, Meta none; the values are the same everywhere."""
    monkeypatch.setattr("herd.checkpoint.source.PIECE_BYTES", 3000)
    source = open_source(folder)
    for to in ("herd", "gguf", "hf", "meta"):
        write(source, tmp_path / to, to, **({"num_shards": 2} if to == "meta" else {}))
        back = open_source(tmp_path / to)
        for name, stored in source.tensors.items():
            assert torch.equal(stored.read(), back.tensors[name].read()), (to, name)
            kept = to in ("herd", "gguf") or (to == "hf" and stored.kind == Kind(4, 32))
            assert back.tensors[name].kind == (stored.kind if kept else None), (to, name)
    write(open_source(tmp_path / "gguf"), tmp_path / "again", "herd")
    for name, stored in open_source(tmp_path / "again").tensors.items():
        assert torch.equal((stored.blocks or stored).read(), (source.tensors[name].blocks or source.tensors[name]).read()), name


@pytest.mark.parametrize("to", ["herd", "hf", "meta", "gguf"])
def test_the_room_that_is_asked_for_is_what_is_written(to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In all but small change: headers, shapes, and that Meta has two of a tied embedding."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    source = quantized(random_source(WIDE))
    with pytest.raises(ResourceError) as caught:
        write(source, tmp_path / "model", to, **({"num_shards": 2} if to == "meta" else {}))
    monkeypatch.undo()
    write(source, tmp_path / "model", to, **({"num_shards": 2} if to == "meta" else {}))
    place = tmp_path / "model"
    written = sum(path.stat().st_size for path in ([place] if place.is_file() else place.iterdir()))
    asked = int(caught.value.message.split(" needs ")[1].split(" bytes")[0].replace(",", ""))
    assert asked == pytest.approx(written, rel=0.2)


# --- what is not whole


def rewrite(folder: Path, name: str, tensor: torch.Tensor) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")


def test_kinds_that_herd_json_does_not_list(folder: Path) -> None:
    facts = json.loads((folder / save.CONFIG).read_text())
    assert facts["quantization"] == ["int4 group 32", "int8 group 32"]
    (folder / save.CONFIG).write_text(json.dumps({**facts, "quantization": ["int8 group 32"]}))
    message = r"is uint8 \[8, 2, 144\], blocks of int4 group 32; .*herd.json lists int8 group 32\nhint: the config does not fit"
    with pytest.raises(CheckpointError, match=message):
        open_source(folder)
    (folder / save.CONFIG).write_text(json.dumps({**facts, "quantization": 3}))
    with pytest.raises(CheckpointError, match=r"is not a herd config"):
        open_source(folder)
    del facts["quantization"]
    (folder / save.CONFIG).write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match=r"herd.json lists none"):
        open_source(folder)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((8, 1, 144), r"1 tensor is misshapen: layers.2.attention.q.weight is \[64, 32\], not \[64, 64\]"),  # codes are missing
        ((7, 2, 144), r"layers.2.attention.q.weight is \[56, 64\], not \[64, 64\]"),
        ((8, 2, 528), r"blocks of int4 group 128; .* lists int4 group 32, int8 group 32"),  # another group
        ((8, 2, 100), r"no blocks that herd knows"),
        ((8, 288), r"no blocks that herd knows"),
    ],
)
def test_blocks_that_do_not_fit(shape: tuple[int, ...], message: str, folder: Path) -> None:
    rewrite(folder, "layers.2.attention.q.weight", torch.zeros(shape, dtype=torch.uint8))
    with pytest.raises(CheckpointError, match=message):
        open_source(folder)


def test_a_cut_file(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"model.safetensors has .* bytes; its header says"):
        open_source(folder)


def test_a_scale_that_is_no_number_is_no_crash(folder: Path) -> None:
    """Nobody reads all weights to open a model. It computes NaN, as one with such a float would."""
    blocks = load_file(folder / "model.safetensors")["layers.2.ffn.down.weight"]
    blocks[0, 0, 128:130] = torch.tensor([255, 127], dtype=torch.uint8)
    rewrite(folder, "layers.2.ffn.down.weight", blocks)
    model, source = load_model(folder)
    with torch.no_grad():
        assert packed_logits(model, [random_prompt(LLAMACPP, 10)]).isnan().any()
    write(source, folder.parent / "model.gguf", "gguf")
    with pytest.raises(CheckpointError, match=r"layers.2.ffn.down.weight holds NaN or infinity"):
        write(quantized(source, 32, with_minimum=True), folder.parent / "again", "herd")
    assert "again" not in entries(folder.parent)


# --- the verb


def test_quantize_prints_the_error_and_is_deterministic(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("herd.log.log.handlers", [])  # leaves the logger as it was
    monkeypatch.setattr("herd.log.log.propagate", True)
    for place in ("a", "b"):
        assert main(["quantize", "tiny", str(tmp_path / place), "--to", "int4"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[:1] for line in out[:7]] == [
        [x] for x in ("part", "embedding", "attention", "shared", "experts", "head", str(tmp_path / "a"))
    ]
    assert out[4].split()[:7] == ["experts", "12", "294,912", "int4", "group", "32", "0.08613"]
    assert entries(tmp_path / "a") == entries(tmp_path / "b")
    for name in entries(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert main(["quantize", "tiny", str(tmp_path / "a"), "--to", "int4"]) == 2
    assert "exists already" in capsys.readouterr().err


def test_the_errors_are_those_of_the_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("herd.checkpoint.source.PIECE_BYTES", 20_000)
    source = random_source(WIDE)
    write(source, tmp_path / "floats", "herd")
    errors = quantize_checkpoint(tmp_path / "floats", tmp_path / "model", group=128, with_minimum=True)
    assert [part for part, _ in errors] == ["embedding", "attention", "dense", "shared", "experts", "head"]
    back = open_source(tmp_path / "model")
    for (part, kind), error in errors.items():
        names = [name for name in source.tensors if part_of(name) == part]
        before = torch.cat([source.tensors[name].read().flatten() for name in names]).double()
        after = torch.cat([back.tensors[name].read().flatten() for name in names]).double()
        rms = before.square().mean().sqrt()
        expected = ((after - before).square().mean().sqrt() / rms, (after - before).abs().max() / rms)
        assert error.relative == pytest.approx([x.item() for x in expected], rel=1e-4)
        assert (error.num_tensors, error.num_weights) == (len(names), len(before))
        assert kind == ("int8 group 32" if part in ("embedding", "head") else "int4 group 128 minimum")


def test_what_is_quantized_as_wanted_is_kept_and_what_is_not_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    llama_file(tmp_path / "4.gguf", gguf.GGMLQuantizationType.Q4_0)
    llama_file(tmp_path / "5.gguf", gguf.GGMLQuantizationType.Q5_1)
    with caplog.at_level(logging.WARNING, logger="herd"):
        assert quantize_checkpoint(tmp_path / "4.gguf", tmp_path / "4")[("embedding", "int8 group 32")].num_tensors == 1
    assert "the weights are quantized already (int4 group 32); quantizing them again adds to their error" in caplog.text  # the embedding
    before, after = open_source(tmp_path / "4.gguf"), open_source(tmp_path / "4")
    for name, stored in before.tensors.items():
        if name.startswith("layers"):
            assert torch.equal((stored.blocks or stored).read(), (after.tensors[name].blocks or after.tensors[name]).read())
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="herd"):
        quantize_checkpoint(tmp_path / "5.gguf", tmp_path / "5")
    assert "the weights are quantized already (Q5_1); quantizing them again adds to their error" in caplog.text


def test_shapes_that_do_not_divide(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="herd"):
        made = quantized(random_source(LLAMACPP), 128)
    assert (
        "32 matrices do not divide into blocks of 8 rows by 128 columns and stay as they are: layers.0.attention.q.weight, ..."
        in caplog.text
    )
    assert {str(stored.kind) for stored in made.tensors.values()} == {"None", "int4 group 128", "int8 group 32"}
    with pytest.raises(CheckpointError, match=r"no matrix of the model divides into blocks of 8 rows by 32 columns"):
        quantized(indexed(replace(SCOUT, num_heads=9, num_kv_heads=9)))


def test_weights_that_are_not_finite_leave_nothing_behind(tmp_path: Path) -> None:
    source = random_source(LLAMACPP)
    source.tensors["layers.1.ffn.experts.up"].read()
    broken = source.tensors["layers.1.ffn.experts.up"].read()
    broken[2, 5, 7] = float("nan")
    tensors = {
        **source.tensors,
        "layers.1.ffn.experts.up": replace(source.tensors["layers.1.ffn.experts.up"], rows=lambda a, b: broken[a:b]),
    }
    with pytest.raises(CheckpointError, match=r"layers.1.ffn.experts.up holds NaN or infinity"):
        write(quantized(replace(source, tensors=tensors)), tmp_path / "model", "herd")
    assert entries(tmp_path) == []


def test_a_float_checkpoint_of_before_is_read(tmp_path: Path) -> None:
    """herd.json without the field, as herd wrote it before there were blocks."""
    write(indexed(LLAMACPP), tmp_path / "model", "herd")
    assert "quantization" not in json.loads((tmp_path / "model" / save.CONFIG).read_text())
    assert_same(indexed(LLAMACPP), open_source(tmp_path / "model"))


def test_blocks_know_their_rows() -> None:
    stored = quantized(random_source(WIDE)).tensors["layers.1.ffn.experts.gate"]
    assert stored.blocks is not None
    whole = of_blocks(stored.blocks)
    assert whole.shape == stored.shape == (3, 128, 128)
    assert torch.equal(whole.rows(1, 3), whole.read()[1:3])
