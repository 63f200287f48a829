"""fp8 checkpoints: made, kept in herd's own format and in Hugging Face's, refused when they are not whole."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from herd.checkpoint import save
from herd.checkpoint.convert import write
from herd.checkpoint.load import fill, load_model, open_source
from herd.checkpoint.quantize import quantize_checkpoint, quantized, quantized_fp8
from herd.checkpoint.source import Source
from herd.cli.main import main
from herd.errors import CheckpointError, ResourceError, UsageError
from herd.model.config import ModelConfig
from herd.model.presets import TINY
from herd.model.swap import BlocksExperts
from herd.ops.fp8 import dequantize
from herd.ops.native import kernels
from herd.quant import fp8
from tests.checkpoint.golden.make_compressed import compressor
from tests.checkpoint.made import LLAMACPP, WIDE, assert_same, entries, random_source
from tests.model.small import packed_logits, random_prompt

EXPERTS = "layers.1.ffn.experts.up"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An fp8 checkpoint in herd's own format."""
    write(quantized_fp8(random_source(LLAMACPP)), tmp_path / "model", "herd")
    return tmp_path / "model"


def assert_same_codes(a: Source, b: Source) -> None:
    assert list(a.tensors) == list(b.tensors)
    for name, stored in a.tensors.items():
        other = b.tensors[name]
        assert torch.equal(stored.read(), other.read()), name
        assert (stored.float8 is None) == (other.float8 is None), name
        if stored.float8 is not None and other.float8 is not None:
            assert torch.equal(stored.float8.weight.read().view(torch.uint8), other.float8.weight.read().view(torch.uint8)), name
            assert torch.equal(stored.float8.scale.read(), other.float8.scale.read()), name


# --- there and back


def test_codes_are_stored_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("herd.checkpoint.source.PIECE_BYTES", 20_000)
    source = random_source(WIDE)
    write(quantized_fp8(source), tmp_path / "model", "herd", shard_bytes=50_000)
    assert json.loads((tmp_path / "model" / save.CONFIG).read_text())["quantization"] == ["float8"]
    back = open_source(tmp_path / "model")
    planned = fp8.plan(source.tensors)
    for name, stored in back.tensors.items():
        before = source.tensors[name].read()
        if name not in planned:
            assert stored.quantization == "" and torch.equal(stored.read(), before)
            continue
        scale = fp8.scales(before)
        assert stored.float8 is not None and stored.quantization == "float8"
        assert torch.equal(stored.float8.scale.read(), scale)
        assert torch.equal(stored.float8.weight.read().view(torch.uint8), fp8.quantize(before, scale).view(torch.uint8))
        assert torch.equal(stored.read(), dequantize(fp8.quantize(before, scale), scale))
        assert torch.equal(stored.rows(1, stored.shape[0] - 1), stored.read()[1:-1])
    assert back.packed_bytes < 0.55 * back.num_bytes
    write(back, tmp_path / "again", "herd", shard_bytes=50_000)
    for name in entries(tmp_path / "model"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


def test_every_format_takes_it(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Hugging Face keeps the codes, the others have floats of the same value."""
    monkeypatch.setattr("herd.checkpoint.source.PIECE_BYTES", 3000)
    source = open_source(folder)
    for to in ("herd", "hf", "meta", "gguf"):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="herd"):
            write(source, tmp_path / to, to, **({"num_shards": 2} if to == "meta" else {}))
        back = open_source(tmp_path / to)
        keeps = to in ("herd", "hf")
        assert (f"the format {to} has no place for the codes of float8: such matrices are written as float32" in caplog.text) != keeps
        if keeps:
            assert_same_codes(source, back)
        for name, stored in source.tensors.items():
            assert torch.equal(stored.read(), back.tensors[name].read()), (to, name)
    write(open_source(tmp_path / "hf"), tmp_path / "again", "hf")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "hf" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("to", ["herd", "hf", "gguf"])
def test_the_room_that_is_asked_for_is_what_is_written(to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    source = quantized_fp8(random_source(WIDE))
    with pytest.raises(ResourceError) as caught:
        write(source, tmp_path / "model", to)
    monkeypatch.undo()
    write(source, tmp_path / "model", to)
    place = tmp_path / "model"
    written = sum(path.stat().st_size for path in ([place] if place.is_file() else place.iterdir()))
    assert int(caught.value.message.split(" needs ")[1].split(" bytes")[0].replace(",", "")) == pytest.approx(written, rel=0.1)


def test_the_rest_tells_the_dtype(tmp_path: Path) -> None:
    """Codes have none, so a file made from bfloat16 says bfloat16, and a GPU computes in that."""
    source = quantized_fp8(random_source(LLAMACPP).to(torch.bfloat16))
    assert source.dtype == torch.bfloat16
    write(source, tmp_path / "hf", "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "bfloat16"


# --- Hugging Face


@pytest.mark.parametrize("config", [WIDE, TINY, replace(WIDE, tied=True)], ids=["text", "eyes", "tied"])
def test_the_hugging_face_file(config: ModelConfig, tmp_path: Path) -> None:
    """Every expert its own matrix and scales, as published; what is left in full is on the list of what to ignore."""
    source = quantized_fp8(random_source(config))
    write(source, tmp_path / "hf", "hf")
    data = json.loads((tmp_path / "hf" / "config.json").read_text())["quantization_config"]
    (group,) = data["config_groups"].values()
    assert (data["format"], group["targets"]) == ("float-quantized", ["Linear"])
    assert group["weights"] == {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
    assert group["input_activations"] == {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
    prefix = "language_model." if config.vision else ""
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    bases = [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]
    for i in range(config.num_experts):
        name = f"{prefix}model.layers.1.feed_forward.experts.{i}.up_proj"
        assert name in bases
        weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
        assert (weight.dtype, scale.dtype, tuple(scale.shape)) == (torch.float8_e4m3fn, torch.float32, (config.hidden_width, 1))
        assert torch.equal(weight.float() * scale, source.tensors[EXPERTS].read()[i])
    plain = [n.removesuffix(".weight") for n, t in tensors.items() if n.endswith(".weight") and t.dim() == 2 and t.dtype == torch.float32]
    assert set(data["ignore"]) == {name for name in plain if "embed_tokens" not in name}
    assert f"{prefix}model.layers.0.self_attn.q_proj" in data["ignore"]
    assert_same_codes(source, open_source(tmp_path / "hf"))


def test_the_package_takes_the_file(tmp_path: Path) -> None:
    """Its schema takes our config, which is what it calls FP8_DYNAMIC, and its code finds our values."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed; the golden codes in tests/quant stand in")
    from compressed_tensors.quantization import QuantizationConfig

    write(quantized_fp8(random_source(WIDE)), tmp_path / "hf", "hf")
    config = QuantizationConfig.model_validate(json.loads((tmp_path / "hf" / "config.json").read_text())["quantization_config"])
    made, scheme = compressor("float-quantized")
    group = config.config_groups["group_0"]
    assert (group.weights, group.input_activations) == (scheme.weights, scheme.input_activations)
    back, tensors = open_source(tmp_path / "hf"), load_file(tmp_path / "hf" / "model.safetensors")
    for i in range(WIDE.num_experts):
        name = f"model.layers.1.feed_forward.experts.{i}.up_proj"
        parts = {part: tensors[f"{name}.{part}"] for part in ("weight", "weight_scale")}
        assert torch.equal(made.decompress(parts, scheme)["weight"], back.tensors[EXPERTS].read()[i])


def test_two_kinds_of_codes_are_refused(tmp_path: Path) -> None:
    a, b = quantized(random_source(WIDE)), quantized_fp8(random_source(WIDE))
    mixed = replace(a, tensors={**a.tensors, EXPERTS: b.tensors[EXPERTS]})
    with pytest.raises(CheckpointError, match=r"the model has float8 and int4 group 32; a Hugging Face file has one of them"):
        write(mixed, tmp_path / "hf", "hf")
    write(mixed, tmp_path / "herd", "herd")  # herd's own has both
    assert open_source(tmp_path / "herd").tensors[EXPERTS].quantization == "float8"
    assert_same_codes(mixed, open_source(tmp_path / "herd"))


# --- models


def test_a_model_on_a_cpu(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Exact in float32 on request; by default int8, a hundredth of the weights' spread away, and told in one line."""
    source = open_source(folder)
    prompt = random_prompt(LLAMACPP, 40)
    with caplog.at_level(logging.WARNING, logger="herd"), torch.no_grad():
        exact = packed_logits(load_model(folder, dtype=torch.float32)[0], [prompt])
        assert torch.equal(exact, packed_logits(fill(source.to(torch.float32), torch.float32), [prompt]))
        assert not caplog.records
        model, _ = load_model(folder)
        near = packed_logits(model, [prompt])
    if kernels() is None:
        assert torch.equal(near, exact)
        return
    assert [record.getMessage() for record in caplog.records] == [
        "no kernels run these matrices as they are, so they are rounded once more while loading: 18 in float8 as int8 group 32. "
        "dtype=torch.float32 loads them exactly, `herd quantize` does it once for good"
    ]
    assert isinstance(model.get_submodule("layers.1.ffn.experts"), BlocksExperts)
    assert 0 < (near - exact).abs().mean() < 0.03 * exact.std()


# --- what is not whole


def rewrite(folder: Path, **change: torch.Tensor | None) -> None:
    tensors: dict[str, torch.Tensor | None] = {**load_file(folder / "model.safetensors"), **change}
    save_file({name: t for name, t in tensors.items() if t is not None}, folder / "model.safetensors")


SCALE = EXPERTS + "_scale"


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (SCALE, None, rf"{EXPERTS} is torch.float8_e4m3fn with no scales; .*herd.json lists float8\nhint: 8-bit floats have scales"),
        (
            SCALE,
            torch.ones(3, 95, 1),
            rf"{EXPERTS} is torch.float8_e4m3fn \[3, 96, 64\] with torch.float32 scales \[3, 95, 1\], not float8",
        ),
        (SCALE, torch.ones(3, 96), r"with torch.float32 scales \[3, 96\], not float8 with a scale for each row"),
        (SCALE, torch.ones(3, 96, 0), r"scales \[3, 96, 0\], not float8"),
        (SCALE, torch.ones(3, 96, 1, dtype=torch.int32), r"with torch.int32 scales"),
        (SCALE, torch.ones(3, 96, 3), r"has 64 columns, which 3 scales do not divide"),
        (EXPERTS, torch.ones(3, 96, 64), rf"{EXPERTS} is torch.float32 with scales; .*herd.json lists float8"),
        (EXPERTS, torch.ones(3, 96, 32).to(torch.float8_e4m3fn), rf"1 tensor is misshapen: {EXPERTS} is \[3, 96, 32\], not \[3, 96, 64\]"),
    ],
)
def test_broken_tensors_are_named(name: str, tensor: torch.Tensor | None, message: str, folder: Path) -> None:
    rewrite(folder, **{name: tensor})
    with pytest.raises(CheckpointError, match=message):
        open_source(folder)


def test_a_config_that_does_not_list_it(folder: Path) -> None:
    facts = json.loads((folder / save.CONFIG).read_text())
    (folder / save.CONFIG).write_text(json.dumps({**facts, "quantization": []}))
    with pytest.raises(CheckpointError, match=r"is torch.float8_e4m3fn with scales; .*herd.json lists none"):
        open_source(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_no_numbers(value: float, folder: Path, tmp_path: Path) -> None:
    """Nobody reads all weights to open a model; reading them tells."""
    scale = torch.full((3, 96, 1), 0.01)
    scale[2, 5] = value
    rewrite(folder, **{SCALE: scale})
    source = open_source(folder)
    for read in (lambda: load_model(folder, dtype=torch.float32), lambda: write(source, tmp_path / "x.gguf", "gguf")):
        with pytest.raises(CheckpointError, match=rf"{EXPERTS} has 8-bit floats or scales that are no finite numbers"):
            read()
    assert entries(tmp_path) == ["model"]


def test_codes_that_are_no_numbers(folder: Path) -> None:
    weight = torch.zeros(3, 96, 64, dtype=torch.uint8)
    weight[1, 2, 3] = 0x7F
    rewrite(folder, **{EXPERTS: weight.view(torch.float8_e4m3fn)})
    with pytest.raises(CheckpointError, match=rf"{EXPERTS} has 8-bit floats or scales that are no finite numbers"):
        open_source(folder).tensors[EXPERTS].read()


# --- the verb


def test_quantize_prints_the_error_and_is_deterministic(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("herd.log.log.handlers", [])  # leaves the logger as it was
    monkeypatch.setattr("herd.log.log.propagate", True)
    for place in ("a", "b"):
        assert main(["quantize", "tiny", str(tmp_path / place), "--to", "fp8"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[:1] for line in out[:4]] == [[x] for x in ("part", "shared", "experts", str(tmp_path / "a"))]
    assert out[2].split()[:5] == ["experts", "12", "294,912", "float8", "0.02522"]
    for name in entries(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    for wrong in (["--group", "128"], ["--minimum"]):
        assert main(["quantize", "tiny", str(tmp_path / "c"), "--to", "fp8", *wrong]) == 2
        assert "fp8 has neither groups nor minimums: a row has one scale" in capsys.readouterr().err


def test_the_errors_are_those_of_the_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("herd.checkpoint.source.PIECE_BYTES", 20_000)
    source = random_source(WIDE)
    write(source, tmp_path / "floats", "herd")
    errors = quantize_checkpoint(tmp_path / "floats", tmp_path / "model", "fp8")
    assert list(errors) == [("dense", "float8"), ("shared", "float8"), ("experts", "float8")]
    back = open_source(tmp_path / "model")
    before = torch.cat([stored.read().flatten() for name, stored in source.tensors.items() if ".experts." in name]).double()
    after = torch.cat([stored.read().flatten() for name, stored in back.tensors.items() if ".experts." in name]).double()
    rms = before.square().mean().sqrt()
    expected = ((after - before).square().mean().sqrt() / rms, (after - before).abs().max() / rms)
    assert errors["experts", "float8"].relative == pytest.approx([x.item() for x in expected], rel=1e-4)
    assert (errors["experts", "float8"].num_tensors, errors["experts", "float8"].num_weights) == (6, len(before))
    with pytest.raises(UsageError, match=r"no numbers are called 'fp9'\nhint: did you mean 'fp8'?"):
        quantize_checkpoint(tmp_path / "floats", tmp_path / "x", "fp9")


def test_what_is_fp8_stays_and_what_is_not_is_told(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert quantize_checkpoint(folder, tmp_path / "again", "fp8") == {}
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    again = "the weights are quantized already ({}); quantizing them again adds to their error"
    with caplog.at_level(logging.WARNING, logger="herd"):
        assert quantize_checkpoint(folder, tmp_path / "int4")["experts", "int4 group 32"].num_tensors == 6
    assert again.format("float8") in caplog.text
    with caplog.at_level(logging.WARNING, logger="herd"):
        quantize_checkpoint(tmp_path / "int4", tmp_path / "fp8", "fp8")
    assert again.format("int4 group 32") in caplog.text
    sizes = [open_source(tmp_path / name).packed_bytes for name in ("fp8", "int4")]
    assert f"fp8 makes this checkpoint larger: {sizes[0]:,} bytes of weights, which now take {sizes[1]:,}; its int4 group 32" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="herd"):
        quantize_checkpoint(folder, tmp_path / "int4 again")
    assert "makes this checkpoint larger" not in caplog.text
    mixed = open_source(tmp_path / "fp8")
    assert {stored.quantization for stored in mixed.tensors.values()} == {"", "float8", "int4 group 32", "int8 group 32"}
    write(mixed.to(torch.float32), tmp_path / "floats", "herd")
    assert_same(mixed.to(torch.float32), open_source(tmp_path / "floats"))


def test_weights_that_are_not_finite_leave_nothing_behind(tmp_path: Path) -> None:
    source = random_source(LLAMACPP)
    broken = source.tensors[EXPERTS].read()
    broken[2, 5, 7] = float("nan")
    tensors = {**source.tensors, EXPERTS: replace(source.tensors[EXPERTS], rows=lambda a, b: broken[a:b])}
    with pytest.raises(CheckpointError, match=rf"{EXPERTS} holds NaN or infinity"):
        write(quantized_fp8(replace(source, tensors=tensors)), tmp_path / "model", "herd")
    assert entries(tmp_path) == []
