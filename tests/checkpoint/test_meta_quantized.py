"""Meta's fp8 and int4 files, written by Meta's own script and held against Meta's own loader and its own rounding."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from herd.checkpoint.convert import write
from herd.checkpoint.load import load_model, open_source
from herd.checkpoint.quantize import quantize_checkpoint
from herd.checkpoint.source import Source, of_blocks
from herd.errors import CheckpointError
from herd.model.swap import BlocksExperts
from herd.ops.int4 import Kind, unpack_int4
from herd.ops.native import kernels
from tests.checkpoint.made import WIDE, random_source
from tests.checkpoint.meta_quantizer import meta_quantizer, quantize_files
from tests.model.small import packed_logits, random_prompt

# All layers have experts, and no two dims of one are alike in a shard: 3 experts, 128 in, 512 / shards out.
MOE = replace(WIDE, moe_step=1, hidden_width=512)
SHARDS = 2
QUANTIZED = [f"layers.{i}.ffn.experts.{part}" for i in (1, 2) for part in ("gate", "up", "down")]  # neither the first layer nor the last
W1 = "layers.1.feed_forward.experts.w1"


def plain() -> Source:
    return random_source(MOE).to(torch.bfloat16)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    """(mode, shards) -> a folder as the script leaves it."""
    root, found = tmp_path_factory.mktemp("meta"), {}
    for num_shards in (1, SHARDS):
        write(plain(), root / f"plain-{num_shards}", "meta", num_shards=num_shards)
        for mode in ("fp8_mixed", "int4_mixed"):
            found[mode, num_shards] = root / f"{mode}-{num_shards}"
            quantize_files(root / f"plain-{num_shards}", found[mode, num_shards], mode, num_shards)
    return found


def copy_of(folder: Path, place: Path) -> Path:
    place.mkdir()
    for path in folder.iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    return place


def change(path: Path, what: Callable[[dict[str, Tensor]], Any]) -> None:
    state = torch.load(path, weights_only=True)
    with torch.no_grad():
        what(state)
    torch.save(state, path)


# --- what is read


@pytest.mark.parametrize("num_shards", [1, SHARDS])
def test_fp8_is_what_their_loader_makes_of_it(num_shards: int, made: dict[tuple[str, int], Path]) -> None:
    folder = made["fp8_mixed", num_shards]
    source = open_source(folder)
    theirs: dict[str, list[Tensor]] = {}
    scales: dict[str, list[Tensor]] = {}
    for rank in range(num_shards):
        with meta_quantizer(num_shards, rank) as meta:
            args = meta.args.ModelArgs(**json.loads((folder / "params.json").read_text()), max_seq_len=64, max_batch_size=1)
            torch.set_default_dtype(torch.bfloat16)  # as their `Llama4.build` does
            model = meta.model.Transformer(args)
            model.load_state_dict(torch.load(folder / f"consolidated.{rank:02d}.pth", weights_only=True), strict=False)
            model = meta.loader.convert_to_quantized_model(model, str(folder), meta.modes.fp8_mixed, use_rich_progress=False)
            for layer, block in enumerate(model.layers):
                for theirs_, ours in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
                    held = getattr(block.feed_forward.experts, theirs_)
                    name = f"layers.{layer}.ffn.experts.{ours}"
                    if name in QUANTIZED:  # [E, out, in] and [E, out]
                        assert held.weight.dtype == torch.float8_e4m3fn
                        theirs.setdefault(name, []).append(held.weight.float() * held.scale[..., None])
                        scales.setdefault(name, []).append(held.scale)
                    else:
                        assert held.dtype == torch.bfloat16
    assert list(theirs) == [name for name, stored in source.tensors.items() if stored.float8 is not None] == QUANTIZED
    for name, parts in theirs.items():
        stored, is_down = source.tensors[name], "down" in name
        assert torch.equal(stored.read(), torch.cat(parts, 2 if is_down else 1)), name
        assert torch.equal(stored.rows(1, 3), stored.read()[1:3]), name
        assert stored.float8 is not None
        expected = torch.stack(scales[name], -1) if is_down else torch.cat(scales[name], 1)[..., None]
        assert torch.equal(stored.float8.scale.read(), expected), name
    assert_the_rest_is_plain(source)


def assert_the_rest_is_plain(source: Source) -> None:
    for name, stored in plain().tensors.items():
        if name not in QUANTIZED:
            assert torch.equal(source.tensors[name].read(), stored.read()), name
            assert source.tensors[name].quantization == "", name


@pytest.mark.parametrize("num_shards", [1, SHARDS])
def test_int4_is_what_their_rounding_made(num_shards: int, made: dict[tuple[str, int], Path]) -> None:
    """The codes are kept and, as the weights were bfloat16, so are the scales."""
    source = open_source(made["int4_mixed", num_shards])
    before = plain().tensors
    with meta_quantizer(1, 0) as meta:
        for name in QUANTIZED:
            stored, is_down = source.tensors[name], "down" in name
            weight = before[name].read()
            parts = weight.chunk(num_shards, 2 if is_down else 1)
            rounded = [[meta.impls.int4_row_quantize(expert.contiguous()) for expert in part] for part in parts]
            codes = torch.cat([torch.stack([c for c, _ in experts]) for experts in rounded], 2 if is_down else 1)
            scale = torch.cat([torch.stack([s.T for _, s in experts]) for experts in rounded], 2 if is_down else 1)  # [E, out, in / 128]
            values = (codes.unflatten(-1, (-1, 128)).float() * scale[..., None].float()).flatten(-2)
            assert torch.equal(stored.read(), values), name
            assert torch.equal(stored.rows(1, 3), values[1:3]), name
            assert (stored.kind, stored.quantization) == (Kind(4, 128), "int4 group 128") and stored.blocks is not None
            ours, half, _ = unpack_int4(stored.blocks.read())
            assert torch.equal(ours.to(torch.int8) - 8, codes) and torch.equal(half.float(), scale.float()), name
            assert torch.equal(of_blocks(stored.blocks).read(), values), name
    assert_the_rest_is_plain(source)


def test_their_loader_does_not_take_their_int4_files(made: dict[tuple[str, int], Path]) -> None:
    """Which is why the script is what int4 is held against."""
    folder = made["int4_mixed", 1]
    with meta_quantizer(1, 0) as meta:
        args = meta.args.ModelArgs(**json.loads((folder / "params.json").read_text()), max_seq_len=64, max_batch_size=1)
        with pytest.raises(RuntimeError, match=r"size mismatch for layers.1.feed_forward.experts.w1"):
            meta.model.Transformer(args).load_state_dict(torch.load(folder / "consolidated.00.pth", weights_only=True), strict=False)


def test_shared_experts_in_int4(made: dict[tuple[str, int], Path], tmp_path: Path) -> None:
    """The loader's names for them, packed by its own functions; the script leaves them out."""
    folder = copy_of(made["int4_mixed", SHARDS], tmp_path / "model")
    expected: dict[str, list[Tensor]] = {}
    names = {"w_in_shared_FD": ("w1", "gate", 0), "w_swiglu_FD": ("w3", "up", 0), "w_out_shared_DF": ("w2", "down", 1)}
    with meta_quantizer(1, 0) as meta:
        for rank in range(SHARDS):
            shard = torch.load(folder / f"consolidated.{rank:02d}.pth", weights_only=True)
            scales = torch.load(folder / f"int4_scales_{rank}.pt", weights_only=True)
            for theirs, (key, ours, _) in names.items():
                weight = shard[f"layers.1.feed_forward.{theirs}.weight"]
                made_of = meta.impls.quantize_int4(weight)
                codes, scale = meta.impls.int4_row_quantize(weight)
                expected.setdefault(ours, []).append((codes.unflatten(-1, (-1, 128)).float() * scale.T[..., None].float()).flatten(-2))
                shard[f"layers.1.feed_forward.{theirs}.weight"] = made_of.weight.view(torch.float8_e4m3fn)
                scales[f"layers.1.feed_forward.shared_expert.{key}"] = made_of.scale.float()
            torch.save(shard, folder / f"consolidated.{rank:02d}.pth")
            torch.save(scales, folder / f"int4_scales_{rank}.pt")
    source = open_source(folder)
    for _, ours, dim in names.values():
        stored = source.tensors[f"layers.1.ffn.shared.{ours}.weight"]
        values = torch.cat(expected[ours], dim)
        assert torch.equal(stored.read(), values), ours
        assert torch.equal(stored.rows(3, 21), values[3:21]), ours
        assert stored.kind == Kind(4, 128) and stored.blocks is not None
        assert torch.equal(of_blocks(stored.blocks).read(), values), ours
        assert torch.equal(stored.blocks.rows(1, 3), stored.blocks.read()[1:3]), ours


@pytest.mark.parametrize("mode", ["fp8_mixed", "int4_mixed"])
def test_into_herds_own_format(mode: str, made: dict[tuple[str, int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("herd.checkpoint.source.PIECE_BYTES", 5000)
    source = open_source(made[mode, SHARDS])
    write(source, tmp_path / "model", "herd")
    back = open_source(tmp_path / "model")
    for name, stored in source.tensors.items():
        assert stored.quantization == back.tensors[name].quantization
        assert torch.equal(stored.read(), back.tensors[name].read()), name


def test_a_row_of_several_scales_elsewhere(made: dict[tuple[str, int], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """compressed-tensors has one scale a row: what has more is written in floats, or rounded anew on request."""
    with caplog.at_level(logging.WARNING, logger="herd"):
        write(open_source(made["fp8_mixed", SHARDS]), tmp_path / "hf", "hf")
    assert "the format hf has no place for the codes of float8" in caplog.text
    source, back = open_source(made["fp8_mixed", SHARDS]), open_source(tmp_path / "hf")
    for name, stored in source.tensors.items():
        assert torch.equal(stored.read(), back.tensors[name].read()), name
        assert (back.tensors[name].float8 is not None) == (name in QUANTIZED and "down" not in name), name
    errors = quantize_checkpoint(made["fp8_mixed", SHARDS], tmp_path / "fp8", "fp8")
    assert errors["experts", "float8"].num_tensors == 2 * 3 + 2  # the first and the last layer, and what had two scales in a row
    write(open_source(tmp_path / "fp8"), tmp_path / "again", "hf")
    assert open_source(tmp_path / "again").tensors["layers.1.ffn.experts.down"].float8 is not None


@pytest.mark.skipif(kernels() is None, reason="without native kernels everything is float32")
@pytest.mark.parametrize("mode", ["fp8_mixed", "int4_mixed"])
def test_a_model_on_a_cpu(mode: str, made: dict[tuple[str, int], Path], caplog: pytest.LogCaptureFixture) -> None:
    prompt = random_prompt(MOE, 40)
    with caplog.at_level(logging.WARNING, logger="herd"), torch.no_grad():
        exact = packed_logits(load_model(made[mode, SHARDS], dtype=torch.float32)[0], [prompt])
        caplog.clear()
        model, _ = load_model(made[mode, SHARDS])
        assert (len(caplog.records) == 1 and "6 in float8 as int8 group 32" in caplog.text) == (mode == "fp8_mixed")
        assert [isinstance(layer.ffn.get_submodule("experts"), BlocksExperts) for layer in model.layers] == [False, True, True, False]
        near = packed_logits(model, [prompt])
    assert (near - exact).abs().mean() < (
        0.03 if mode == "fp8_mixed" else 1e-4
    ) * exact.std()  # the mean: a token may choose another expert


# --- scales that float16 does not hold


def test_scales_that_float16_does_not_hold(made: dict[tuple[str, int], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = copy_of(made["int4_mixed", SHARDS], tmp_path / "model")

    def bend(scales: dict[str, Tensor]) -> None:
        scales[W1][0, 0, 5] = 1e-6 / 8  # the script's smallest
        scales[W1][0, 0, 6] = 0.1  # no bfloat16 number

    change(folder / "int4_scales_1.pt", bend)
    stored = open_source(folder).tensors["layers.1.ffn.experts.gate"]
    row = 512 // SHARDS
    with caplog.at_level(logging.WARNING, logger="herd"):
        values = stored.read()  # exact
        assert not caplog.records
        assert stored.blocks is not None
        near = of_blocks(stored.blocks).read()
        stored.blocks.read()
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder} has int4 scales that float16 does not hold: they are rounded, by 2^-11 of themselves or 2^-25"
    ]
    difference = (near - values).abs()
    assert 0 < difference[0, row + 5].max() <= 8 * 2**-25
    assert 0 < difference[0, row + 6].max() <= 0.8 * 2**-11
    difference[0, row + 5 : row + 7] = 0
    assert difference.max() == 0
    assert (values[0, row + 6] / 0.1).round().abs().max() <= 8


# --- what is not whole


@pytest.mark.parametrize("mode", ["fp8_mixed", "int4_mixed"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e9])
def test_scales_that_are_no_numbers(mode: str, value: float, made: dict[tuple[str, int], Path], tmp_path: Path) -> None:
    folder = copy_of(made[mode, SHARDS], tmp_path / "model")
    kind = mode.partition("_")[0]
    change(folder / f"{kind}_scales_1.pt", lambda scales: scales[W1][0, 0].fill_(value))
    stored = open_source(folder).tensors["layers.1.ffn.experts.gate"]
    if kind == "int4":
        assert stored.blocks is not None
        with pytest.raises(CheckpointError, match=rf"model: {W1} has scales that are not finite or too large for float16"):
            stored.blocks.read()
    elif value != 1e9:
        with pytest.raises(CheckpointError, match=rf"model: {W1} has 8-bit floats or scales that are no finite numbers"):
            stored.read()


def drop(key: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda state: state.pop(key)


def put(key: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], Any]:
    return lambda state: state.update({key: tensor})


@pytest.mark.parametrize(
    ("mode", "file", "what", "message"),
    [
        ("fp8_mixed", "fp8_scales_1.pt", drop(W1), rf"fp8_scales_1.pt: 1 tensor is missing: {W1}"),
        ("fp8_mixed", "fp8_scales_0.pt", drop(W1), rf"fp8_scales_1.pt: 1 tensor is left over that no part of the model takes: {W1}"),
        ("fp8_mixed", "fp8_scales_1.pt", put(W1, torch.ones(3, 128)), rf"misshapen: {W1} is \[3, 128\], not \[3, 256\]"),
        ("fp8_mixed", "fp8_scales_1.pt", put(W1, torch.ones(3, 256).half()), rf"{W1} is torch.float16, not float32"),
        ("fp8_mixed", "fp8_scales_1.pt", put("layers.1.x", torch.ones(3)), r"1 tensor is left over .*: layers.1.x"),
        ("fp8_mixed", "consolidated.01.pth", put("layers.1.feed_forward.experts.moe_w_in_eD_F", torch.ones(384, 256)), "and has scales"),
        (
            *("fp8_mixed", "consolidated.01.pth"),
            put("layers.1.feed_forward.w_in_shared_FD.weight", torch.ones(256, 128).to(torch.float8_e4m3fn)),
            r"w_in_shared_FD.weight is torch.float8_e4m3fn and has no scales beside it\nhint: codes \(float8_e4m3fn\) have scales",
        ),
        ("int4_mixed", "int4_scales_0.pt", put(W1, torch.ones(3, 4, 256)), rf"{W1} is \[3, 4, 256\], not \[3, 1, 256\]"),  # groups of 32
        (
            *("int4_mixed", "consolidated.01.pth"),
            put("layers.1.feed_forward.experts.moe_w_in_eD_F", torch.ones(96, 256).to(torch.float8_e4m3fn)),
            r"moe_w_in_eD_F is \[96, 256\], not \[192, 256\]",
        ),
    ],
)
def test_broken_files_are_named(
    mode: str, file: str, what: Callable[[dict[str, Tensor]], Any], message: str, made: dict[tuple[str, int], Path], tmp_path: Path
) -> None:
    folder = copy_of(made[mode, SHARDS], tmp_path / "model")
    change(folder / file, what)
    with pytest.raises(CheckpointError, match=message):
        open_source(folder)


def test_files_of_scales_that_are_missing_or_too_many(made: dict[tuple[str, int], Path], tmp_path: Path) -> None:
    folder = copy_of(made["fp8_mixed", SHARDS], tmp_path / "model")
    scales = (folder / "fp8_scales_1.pt").read_bytes()
    (folder / "fp8_scales_1.pt").unlink()
    with pytest.raises(CheckpointError, match=r"model has 2 shards and lacks fp8_scales_1.pt\nhint: fetch them"):
        open_source(folder)
    (folder / "fp8_scales_0.pt").unlink()
    with pytest.raises(CheckpointError, match=r"moe_w_in_eD_F is torch.float8_e4m3fn and has no scales beside it"):
        open_source(folder)
    for rank in range(3):
        (folder / f"fp8_scales_{rank}.pt").write_bytes(scales)
    with pytest.raises(CheckpointError, match=r"model has 2 shards and lacks shards for fp8_scales_2.pt"):
        open_source(folder)
    (folder / "int4_scales_0.pt").write_bytes(scales)
    with pytest.raises(CheckpointError, match=r"has scales of int4 and of fp8: int4_scales_0.pt, fp8_scales_0.pt"):
        open_source(folder)


def test_columns_that_are_no_whole_groups(tmp_path: Path) -> None:
    write(random_source(replace(MOE, hidden_width=384)), tmp_path / "model", "meta", num_shards=SHARDS)
    key = "layers.1.feed_forward.experts.w2"
    for rank in range(SHARDS):
        torch.save({key: torch.ones(3, 1, 128)}, tmp_path / "model" / f"int4_scales_{rank}.pt")
    with pytest.raises(CheckpointError, match=rf"{key} is for 192 columns in each of 2 shards, no whole groups of 128"):
        open_source(tmp_path / "model")


def test_a_cut_file_of_scales(made: dict[tuple[str, int], Path], tmp_path: Path) -> None:
    folder = copy_of(made["fp8_mixed", SHARDS], tmp_path / "model")
    path = folder / "fp8_scales_0.pt"
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(CheckpointError, match=r"fp8_scales_0.pt .* is cut short or is no .pth file"):
        open_source(folder)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"scheme": "int4_weight_int8_dynamic_activation"}, "quantization_args with scheme int4_weight_int8_dynamic_activation is not"),
        ({"group_size": 32}, "quantization_args with group_size 32 is not supported\nhint: herd reads .* in groups of 128"),
        ({"spinquant": True}, "quantization_args with spinquant True is not supported"),
        ({"group_size": 128, "scheme": None, "spinquant": False}, None),
    ],
)
def test_arguments_of_other_quantizations(
    args: dict[str, Any], message: str | None, made: dict[tuple[str, int], Path], tmp_path: Path
) -> None:
    """Those of Llama 3.2, as their own class names them."""
    folder = copy_of(made["int4_mixed", 1], tmp_path / "model")
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps({**params, "quantization_args": args}))
    if message is None:
        open_source(folder)
        return
    with pytest.raises(CheckpointError, match=message):
        open_source(folder)
