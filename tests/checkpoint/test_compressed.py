"""compressed-tensors, held against the package of that name (or what it once made)."""

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from herd.checkpoint import compressed, hf
from herd.checkpoint.compressed import Scheme, matrices
from herd.checkpoint.convert import write
from herd.checkpoint.load import load_model, open_source
from herd.checkpoint.quantize import quantized
from herd.checkpoint.safefile import read_header
from herd.checkpoint.source import Source, of_blocks
from herd.errors import CheckpointError
from herd.model.config import ModelConfig
from herd.model.presets import TINY
from herd.ops.int4 import Kind, unpack_int4
from tests.checkpoint.golden.make_compressed import PATH, compressor
from tests.checkpoint.made import WIDE, entries, random_source
from tests.model.small import packed_logits, random_prompt

INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128, "dynamic": False, "observer": "mse"}
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "group_size": None, "dynamic": False}


def config_json(format: str, **changes: Any) -> dict[str, Any]:
    """A `quantization_config` as llm-compressor writes one; `weights__key` changes the inner ones."""
    weights = dict(INT4 if format == "pack-quantized" else FLOAT8)
    outer = {key: value for key, value in changes.items() if not key.startswith("weights__")}
    weights |= {key.removeprefix("weights__"): value for key, value in changes.items() if key.startswith("weights__")}
    return {
        "config_groups": {"group_0": {"input_activations": None, "output_activations": None, "targets": ["Linear"], "weights": weights}},
        "format": format,
        "global_compression_ratio": None,
        "ignore": ["language_model.lm_head"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        **outer,
    }


def file_of(tensors: Mapping[str, Tensor], path: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


# --- one matrix


def test_int4_is_read_as_the_package_reads_it(tmp_path: Path) -> None:
    golden = json.loads(PATH.read_text())["pack-quantized"]
    scale = torch.tensor(golden["scale"])
    tensors = {"a.weight_packed": torch.tensor(golden["codes"], dtype=torch.int32), "a.weight_shape": torch.tensor([8, 256])}
    expected = torch.tensor(golden["weight"])
    for dtype in (torch.bfloat16, torch.float32):
        path = file_of({**tensors, "a.weight_scale": scale.to(dtype)}, tmp_path / "x.safetensors")
        stored = matrices(read_header(path), Scheme(False, 128))["a.weight"]
        assert torch.equal(stored.read(), expected)
        assert torch.equal(stored.rows(3, 5), expected[3:5])
        assert stored.kind == (Kind(4, 128) if dtype == torch.bfloat16 else None)  # a float32 scale has no float16
        if stored.blocks is not None:
            assert torch.equal(of_blocks(stored.blocks).read(), expected)
            codes = unpack_int4(stored.blocks.read())[0]
        else:
            assert stored.near is not None and stored.rounded == "int4 group 128, float32 scales"
            kept, half, _ = unpack_int4(stored.near.read())
            assert torch.equal(kept, codes) and torch.equal(half, scale.half())


@pytest.mark.parametrize(("group", "herd"), [(64, 32), (256, 128), (0, 128)])
def test_larger_groups_become_several_of_herds(group: int, herd: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(-(2**31), 2**31, (16, 64), generator=generator, dtype=torch.int64).to(torch.int32)
    scale = torch.rand(16, 512 // group if group else 1, generator=generator).bfloat16()
    tensors = {"a.weight_packed": words, "a.weight_shape": torch.tensor([16, 512]), "a.weight_scale": scale}
    stored = matrices(read_header(file_of(tensors, tmp_path / "x.safetensors")), Scheme(False, group))["a.weight"]
    assert stored.kind == Kind(4, herd) and stored.blocks is not None
    numbers = torch.stack([(words >> 4 * n & 15) - 8 for n in range(8)], -1).flatten(-2)
    expected = (numbers.view(16, scale.shape[1], -1) * scale.float()[..., None]).flatten(-2)
    assert torch.equal(stored.read(), expected) and torch.equal(of_blocks(stored.blocks).read(), expected)


def test_small_groups_have_blocks_near_them(tmp_path: Path) -> None:
    tensors = {"a.weight_packed": torch.full((8, 4), 0x76543210, dtype=torch.int32), "a.weight_shape": torch.tensor([8, 32])}
    path = file_of({**tensors, "a.weight_scale": torch.ones(8, 2).bfloat16()}, tmp_path / "x.safetensors")
    stored = matrices(read_header(path), Scheme(False, 16))["a.weight"]
    assert (stored.kind, stored.rounded) == (None, "int4 group 16")
    assert stored.near is not None and of_blocks(stored.near).kind == Kind(4, 32, True)


def test_float8_is_read_as_the_package_reads_it(tmp_path: Path) -> None:
    golden = json.loads(PATH.read_text())["float-quantized"]
    weight = torch.tensor(golden["codes"], dtype=torch.uint8).view(torch.float8_e4m3fn)
    path = file_of({"a.weight": weight, "a.weight_scale": torch.tensor(golden["scale"]).bfloat16()}, tmp_path / "x.safetensors")
    stored = matrices(read_header(path), Scheme(True, 0))["a.weight"]
    assert torch.equal(stored.read(), torch.tensor(golden["weight"]))
    assert torch.equal(stored.rows(3, 5), torch.tensor(golden["weight"])[3:5])
    assert (stored.kind, stored.rounded) == (None, "float8")
    assert stored.float8 is not None
    assert torch.equal(stored.float8.weight.read().view(torch.uint8), weight.view(torch.uint8))  # the codes as they are
    assert torch.equal(stored.float8.scale.read(), torch.tensor(golden["scale"]))


def test_small_scales_are_rounded_a_little_and_large_ones_refused(tmp_path: Path) -> None:
    tensors = {"a.weight_packed": torch.full((8, 4), -1, dtype=torch.int32), "a.weight_shape": torch.tensor([8, 32])}
    path = file_of({**tensors, "a.weight_scale": torch.full((8, 1), 1.01e-7).bfloat16()}, tmp_path / "x.safetensors")
    stored = matrices(read_header(path), Scheme(False, 32))["a.weight"]
    assert stored.blocks is not None
    assert (of_blocks(stored.blocks).read() - stored.read()).abs().max() <= 8 * 2**-25
    path = file_of({**tensors, "a.weight_scale": torch.full((8, 1), 1e6).bfloat16()}, tmp_path / "x.safetensors")
    stored = matrices(read_header(path), Scheme(False, 32))["a.weight"]
    assert stored.blocks is not None
    with pytest.raises(CheckpointError, match=r"a.weight_packed has scales that are not finite or too large for float16"):
        stored.blocks.read()


# --- whole checkpoints


@pytest.mark.parametrize(
    ("config", "group"), [(WIDE, 128), (WIDE, 32), (TINY, 32), (replace(WIDE, tied=True), 128)], ids=["128", "32", "eyes", "tied"]
)
def test_there_and_back(config: ModelConfig, group: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = quantized(random_source(config), group)
    with caplog.at_level(logging.WARNING, logger="herd"):
        write(source, tmp_path / "hf", "hf", shard_bytes=100_000)
    assert "the format hf has no place for the codes of int8 group 32: such matrices are written as float32" in caplog.text
    back = open_source(tmp_path / "hf")
    assert list(back.tensors) == list(source.tensors)
    for name, stored in source.tensors.items():
        other = back.tensors[name]
        if stored.kind == Kind(4, group):
            assert stored.blocks is not None and other.blocks is not None
            assert torch.equal(stored.blocks.read(), other.blocks.read()), name
        else:
            assert other.blocks is None and torch.equal(stored.read(), other.read()), name
    write(back, tmp_path / "again", "hf", shard_bytes=100_000)
    for name in entries(tmp_path / "hf"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()


def test_the_file_is_what_the_package_takes(tmp_path: Path) -> None:
    """Its own schema takes our config, names every layer that is not quantized, and its own code finds our values."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed; the golden tests above stand in")
    from compressed_tensors.quantization import QuantizationConfig

    source = quantized(random_source(WIDE), 128)
    write(source, tmp_path / "hf", "hf")
    data = json.loads((tmp_path / "hf" / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(data)
    made, scheme = compressor("pack-quantized")
    assert config.format == "pack-quantized"
    assert config.config_groups["group_0"].weights == scheme.weights  # what the package calls W4A16
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    bases = [name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")]
    assert len(bases) == 4 * 4 + 2 * 3 + 2 * 3 + 2 * 3 * 3
    assert not set(config.ignore) & set(bases)
    plain = [n.removesuffix(".weight") for n, t in tensors.items() if n.endswith(".weight") and t.dim() == 2 and "embed" not in n]
    assert set(config.ignore) == set(plain) == {"lm_head", "model.layers.1.feed_forward.router", "model.layers.3.feed_forward.router"}
    back = open_source(tmp_path / "hf")
    for base in bases:
        parts = {part: tensors[f"{base}.{part}"] for part in ("weight_packed", "weight_scale", "weight_shape")}
        theirs = made.decompress({**parts, "weight_scale": parts["weight_scale"].float()}, scheme)["weight"]
        name = base.removeprefix("model.").replace("self_attn", "attention").replace("feed_forward", "ffn").replace("_proj", "")
        if ".experts." in name:
            head, _, rest = name.partition(".experts.")
            index, _, projection = rest.partition(".")
            ours = back.tensors[f"{head}.experts.{projection}"].read()[int(index)]
        else:
            ours = back.tensors[f"{name}.weight".replace("shared_expert", "shared")].read()
        assert torch.equal(ours, theirs), base


@pytest.mark.parametrize("format", ["pack-quantized", "float-quantized"])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_file_of_the_package_is_read(format: str, prefix: str, tmp_path: Path) -> None:
    """A model with images, compressed by the package as llm-compressor lays it out: attention and experts; the rest in bfloat16."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed; the golden tests above stand in")
    made, scheme = compressor(format)
    source = random_source(replace(TINY, width=128, hidden_width=128)).to(torch.bfloat16)
    write(source, tmp_path / "plain", "hf")
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj")) and ".experts." in n]:
        fused = tensors.pop(name)
        halves = zip(("gate_proj", "up_proj"), fused.chunk(2, -1), strict=True) if "gate_up" in name else [("down_proj", fused)]
        for projection, experts in halves:
            for i, expert in enumerate(experts):
                tensors[f"{name.rpartition('.')[0]}.{i}.{projection}.weight"] = expert.T.contiguous()
    expected = dict(tensors)
    for name in [n for n in tensors if ("proj.weight" in n and "self_attn" in n) or ".experts." in n or "shared_expert" in n]:
        weight = tensors.pop(name)
        if weight.shape[1] % 128:  # the o projection of this small model: in full, and ignored
            tensors[name] = weight
            continue
        groups = weight.unflatten(-1, (-1, 128)) if format == "pack-quantized" else weight[:, None]
        scale = groups.abs().amax(-1) / (7.5 if format == "pack-quantized" else 448)
        packed = made.compress({"weight": weight, "weight_scale": scale}, scheme)
        tensors |= {name.replace("weight", part): tensor for part, tensor in packed.items()}
        expected[name] = made.decompress({**packed, "weight_scale": scale.float()}, scheme)["weight"]
    for folder, content in (("quantized", tensors), ("expected", {n: t.float() for n, t in expected.items()})):
        (tmp_path / folder).mkdir()
        file_of({prefix + n: t for n, t in content.items()}, tmp_path / folder / "model.safetensors")
        data = json.loads((tmp_path / "plain" / "config.json").read_text())
        if folder == "quantized":
            data["quantization_config"] = config_json(format)
        (tmp_path / folder / "config.json").write_text(json.dumps(data))
    ours, theirs = open_source(tmp_path / "quantized"), open_source(tmp_path / "expected")
    for name, stored in theirs.tensors.items():
        assert torch.equal(ours.tensors[name].read().float(), stored.read()), name
    down = ours.tensors["layers.1.ffn.experts.down"]
    assert (down.kind, down.rounded) == ((Kind(4, 128), "") if format == "pack-quantized" else (None, "float8"))
    assert (down.float8 is not None) == (format == "float-quantized")
    prompt = random_prompt(source.config, 40, num_tiles=1)
    with torch.no_grad():
        a, b = (packed_logits(load_model(tmp_path / folder, dtype=torch.float32)[0], [prompt]) for folder in ("quantized", "expected"))
    assert torch.equal(a, b)


def test_minimums_have_no_place_and_become_floats(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = quantized(random_source(WIDE), 32, with_minimum=True)
    with caplog.at_level(logging.WARNING, logger="herd"):
        write(source, tmp_path / "hf", "hf")
    assert "no place for the codes of int4 group 32 minimum, int8 group 32: such matrices are written as float32" in caplog.text
    assert "quantization_config" not in json.loads((tmp_path / "hf" / "config.json").read_text())


# --- what is refused


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "fp8"}, "quantization_config = 'fp8' is not supported\nhint: herd reads compressed-tensors"),
        (config_json("nvfp4-pack-quantized"), "quantization_config with format nvfp4-pack-quantized, .* is not supported"),
        (config_json("pack-quantized", config_groups={}), "config_groups {} is not supported"),
        (config_json("pack-quantized", config_groups=None), "config_groups null is not supported"),
        (config_json("pack-quantized", weights__group_size=None), "are not supported"),
        (config_json("pack-quantized", sparsity_config={"format": "sparse-24-bitmask"}), "is not supported"),
        (config_json("pack-quantized", kv_cache_scheme={"num_bits": 8}), "quantization_config with kv_cache_scheme is not supported"),
        (config_json("pack-quantized", weights__symmetric=False), 'weights quantized as .*"symmetric": false.* are not supported'),
        (config_json("pack-quantized", weights__num_bits=8), "are not supported"),
        (config_json("float-quantized", weights__strategy="tensor"), "are not supported"),
        (config_json("float-quantized", weights__strategy="block"), "are not supported"),
    ],
)
def test_other_schemes_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        compressed.read_config(config, "config.json")


def test_published_schemes_are_read() -> None:
    assert compressed.read_config(config_json("pack-quantized"), "x") == Scheme(False, 128)
    assert compressed.read_config(config_json("pack-quantized", weights__strategy="channel", weights__group_size=None), "x") == Scheme(
        False, 0
    )
    assert compressed.read_config(config_json("float-quantized"), "x") == Scheme(True, 0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(quantized(random_source(WIDE), 128), tmp_path / "hf", "hf")
    return tmp_path / "hf"


NAME = "model.layers.1.feed_forward.experts.2.up_proj"


@pytest.mark.parametrize(
    ("part", "tensor", "message"),
    [
        ("weight_scale", None, f"{NAME}.weight_packed".replace("model.", "left over .*", 1)),
        (
            "weight_scale",
            torch.zeros(128, 4, dtype=torch.float16),
            r"is torch.int32 \[128, 16\] with scales \[128, 4\], not int4 \[128, 128\]",
        ),
        ("weight_packed", torch.zeros(128, 8, dtype=torch.int32), r"is torch.int32 \[128, 8\] with scales"),
        ("weight_shape", torch.tensor([128]), r"not int4 \[0, 0\]"),
        ("weight_shape", torch.tensor([128, 64]), r"not int4 \[128, 64\] in groups of 128"),
        ("weight_g_idx", torch.zeros(128, dtype=torch.int32), r"1 tensor is left over .*up_proj.weight_g_idx"),
    ],
)
def test_broken_matrices_are_named(part: str, tensor: Tensor | None, message: str, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(f"{NAME}.{part}", None)
    if tensor is not None:
        tensors[f"{NAME}.{part}"] = tensor
    file_of(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        open_source(folder)


def test_a_config_that_is_refused_names_its_file(folder: Path) -> None:
    data = json.loads((folder / "config.json").read_text())
    data["quantization_config"]["quant_method"] = "gptq"
    (folder / "config.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=r"hf/config.json: quantization_config = 'gptq' is not supported"):
        open_source(folder)


def test_two_groups_are_refused(tmp_path: Path) -> None:
    a, b = quantized(random_source(WIDE), 32), quantized(random_source(WIDE), 128)
    mixed: Source = replace(a, tensors={**a.tensors, "layers.0.attention.q.weight": b.tensors["layers.0.attention.q.weight"]})
    with pytest.raises(CheckpointError, match=r"the model has int4 group 128 and int4 group 32; a Hugging Face file has one"):
        write(mixed, tmp_path / "hf", "hf")
    assert entries(tmp_path) == []


def test_the_codes_of_a_file_by_hand(folder: Path) -> None:
    """Column v * 8 + n in bits 4 n of word v, the number being code - 8."""
    tensors = load_file(folder / "model.safetensors")
    blocks = open_source(folder).tensors["layers.1.ffn.experts.up"].blocks
    assert blocks is not None
    codes, scale, _ = unpack_int4(blocks.read()[2])
    words = tensors[f"{NAME}.weight_packed"]
    for row, v, n in ((0, 0, 0), (5, 3, 7), (127, 15, 4)):
        assert words[row, v] >> 4 * n & 15 == codes[row, v * 8 + n]
    assert torch.equal(tensors[f"{NAME}.weight_scale"], scale)
    assert tensors[f"{NAME}.weight_shape"].tolist() == [128, 128]
    assert hf.CONFIG in entries(folder)
