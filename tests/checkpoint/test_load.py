"""herd's own format, finding out what a path is, filling a model, and never leaving half a checkpoint."""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from herd.checkpoint import safefile, save
from herd.checkpoint.convert import convert, write
from herd.checkpoint.load import load_model, open_model, open_source
from herd.checkpoint.names import TABLE, file_tensors, herd_shapes
from herd.checkpoint.source import Region, Source, of_model
from herd.errors import CheckpointError, HerdError, ModelNotFound, ResourceError, UsageError
from herd.model.config import ModelConfig
from herd.model.llama4 import build
from herd.model.presets import PRESETS, TINY
from herd.text.tokenizer import byte_tokenizer, load_tokenizer
from tests.checkpoint.made import FAMILY, LLAMACPP, SCOUT, assert_same, entries, indexed, random_source
from tests.model.small import packed_logits, random_prompt


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint in herd's own format."""
    write(indexed(SCOUT), tmp_path / "model", "herd", shard_bytes=100_000)
    return tmp_path / "model"


# --- the table


@pytest.mark.parametrize("name", ["scout", "maverick", "tiny", "cria"])
def test_every_tensor_of_the_family_has_a_place_in_every_format(name: str) -> None:
    """And only one; the released models' parameter counts come out whole, so no tensor is lost on the way."""
    config = PRESETS[name]
    shapes = herd_shapes(config)
    for column in ("hf", "meta", "gguf"):
        found = file_tensors(config, column)
        placed = [herd for t in found.values() for herd in t.herd]
        expected = [h for h in shapes if column != "gguf" or not h.startswith(("vision.", "projector."))]
        assert sorted(placed) == sorted(expected)
        sizes = [torch.Size(t.shape).numel() for t in found.values()]
        assert sum(sizes) == sum(torch.Size(shapes[h]).numel() for h in expected)


def test_no_row_of_the_table_is_unused() -> None:
    used = {re.sub(r"layers\.\d+", "layers.{i}", name) for config in FAMILY.values() for name in herd_shapes(config)}
    assert used == set(TABLE)


def test_names_of_the_released_files() -> None:
    """Source: the published index of the Hugging Face files, and Meta's conversion script."""
    scout = PRESETS["scout"]
    hf, meta = file_tensors(scout, "hf"), file_tensors(scout, "meta")
    assert hf["language_model.model.layers.47.feed_forward.experts.gate_up_proj"].shape == (16, 5120, 16384)
    assert hf["language_model.model.layers.0.feed_forward.experts.down_proj"].shape == (16, 8192, 5120)
    assert hf["vision_model.patch_embedding.linear.weight"].shape == (1408, 588)
    assert meta["layers.0.attention.wqkv.weight"].shape == (7168, 5120)
    assert meta["layers.0.feed_forward.router_DE"].shape == (5120, 16)
    maverick = file_tensors(PRESETS["maverick"], "meta")
    assert maverick["layers.0.feed_forward.mlp.fc1_weight"].shape == (32768, 5120)
    assert "layers.0.feed_forward.mlp.layer_norm_weight" in maverick
    assert "layers.1.feed_forward.norm.weight" in maverick


# --- herd's own format


@pytest.mark.parametrize("config", FAMILY.values(), ids=FAMILY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_is_the_same_bit_for_bit(config: ModelConfig, dtype: torch.dtype, tmp_path: Path) -> None:
    source = indexed(config, dtype)
    write(source, tmp_path / "model", "herd")
    back = open_source(tmp_path / "model")
    assert (back.config, back.files, back.dtype, back.kind) == (config, source.files, dtype, "herd")
    assert_same(source, back)


def test_the_safetensors_library_reads_our_files(folder: Path) -> None:
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 3
    expected = indexed(SCOUT).tensors
    found = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name].read()) for name, tensor in found.items())
    index = json.loads((folder / safefile.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(stored.num_bytes for stored in expected.values())


def test_every_pair_of_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any format becomes any other, and the weights stay the same bit for bit, in however small pieces they travel."""
    monkeypatch.setattr("herd.checkpoint.source.PIECE_BYTES", 3000)
    source = random_source(replace(LLAMACPP, bos_id=200000, stop_ids=(200001, 200007, 200008), pad_id=200018, patch_id=200092))
    for first in ("herd", "hf", "meta", "gguf"):
        start = tmp_path / f"{first}.gguf"
        write(source, start, first, **({"num_shards": 2} if first == "meta" else {}))
        for second in ("herd", "hf", "meta", "gguf"):
            write(open_source(start), tmp_path / f"{first}-{second}", second, **({"num_shards": 2} if second == "meta" else {}))
            assert_same(source, open_source(tmp_path / f"{first}-{second}"))


def test_a_name_can_be_converted(tmp_path: Path) -> None:
    convert("tiny", tmp_path / "tiny", "herd")
    assert_same(open_model("tiny"), open_source(tmp_path / "tiny"))


def test_dtype_is_changed_on_request(tmp_path: Path, folder: Path) -> None:
    convert(folder, tmp_path / "half", "herd", dtype=torch.bfloat16)
    half = open_source(tmp_path / "half")
    assert half.dtype == torch.bfloat16
    assert torch.equal(half.tensors["norm.weight"].read(), indexed(SCOUT, torch.bfloat16).tensors["norm.weight"].read())


# --- models


def test_every_parameter_is_set_and_weights_that_fit_are_not_copied(folder: Path) -> None:
    model, source = load_model(folder)
    expected = indexed(SCOUT).tensors
    for name, p in model.named_parameters():
        assert torch.equal(p, expected[name].read()), name
        assert p.dtype == torch.float32
        assert p.requires_grad
    assert source.tensors["embed.weight"].view is not None
    with torch.no_grad():
        model.embed.weight.fill_(0)  # mapped pages are private: the file keeps its values
    assert_same(indexed(SCOUT), open_source(folder))


def test_weights_of_another_dtype_are_converted(tmp_path: Path) -> None:
    source = random_source(SCOUT).to(torch.bfloat16)
    write(source, tmp_path / "model", "herd")
    model, _ = load_model(tmp_path / "model")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    prompt = random_prompt(SCOUT, 40, num_tiles=1)
    expected = build(SCOUT, device="cpu")
    expected.load_state_dict({name: stored.read().float() for name, stored in source.tensors.items()})
    with torch.no_grad():
        assert torch.equal(packed_logits(model, [prompt]), packed_logits(expected, [prompt]))
    kept, _ = load_model(tmp_path / "model", dtype=torch.bfloat16)
    assert kept.head is not None
    assert torch.equal(kept.head.weight, source.tensors["head.weight"].read())


def test_tiny_has_the_same_random_weights_every_time() -> None:
    (a, source), (b, _) = load_model("tiny"), load_model("tiny")
    assert source.config == a.config == TINY
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert source.files == byte_tokenizer().files()
    assert open_model("tiny").kind == "memory"


def test_a_live_model_can_be_saved_and_its_tokenizer_with_it(tmp_path: Path) -> None:
    model, source = load_model("tiny")
    write(of_model(model, source.files), tmp_path / "model", "herd")
    assert load_tokenizer(tmp_path / "model").encode("hi") == [104, 105]
    assert_same(source, open_source(tmp_path / "model"))


# --- what is wrong with a path


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"nowhere does not exist\nhint: herd opens: a folder with herd.json"):
        open_source(tmp_path / "nowhere")


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is an empty folder\nhint: herd opens"):
        open_source(tmp_path)


def test_a_folder_or_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"is no checkpoint that herd knows; it holds notes.txt"):
        open_source(tmp_path)
    with pytest.raises(CheckpointError, match=r"notes.txt is no checkpoint that herd knows"):
        open_source(tmp_path / "notes.txt")


def test_a_config_without_weights(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"holds no .safetensors file"):
        open_source(folder)


def test_a_missing_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[2].unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of \d+ weight files: model-00003-of-"):
        open_source(folder)


def test_a_truncated_shard(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    size = path.stat().st_size
    os.truncate(path, size - 100)
    with pytest.raises(CheckpointError, match=f"model-00001-of-.* has {size - 100:,} bytes; its header says {size:,}"):
        open_source(folder)
    os.truncate(path, 20)
    with pytest.raises(CheckpointError, match=r"is no safetensors file, or its header of .* bytes is cut"):
        open_source(folder)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(10))
    with pytest.raises(CheckpointError, match=r"ends 6 bytes before the tensor at 0 does"):
        Region(path, 0, (2, 2), torch.float32).rows(0, 2)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Write a checkpoint's weights anew with some tensors changed."""
    from safetensors.torch import load_file, save_file

    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    for path in folder.glob("model*"):
        path.unlink()
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_tensors_missing_left_over_and_misshapen(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(4):
            del tensors[f"layers.{layer}.ffn.router.weight"]
        tensors["layers.0.ffn.ruoter.weight"] = torch.zeros(1)
        tensors["embed.weight"] = torch.zeros(8, 8)

    rewrite(folder, change)
    with pytest.raises(CheckpointError) as caught:
        open_source(folder)
    message = caught.value.message
    assert "4 tensors are missing: layers.0.ffn.router.weight, layers.1.ffn.router.weight, layers.2.ffn.router.weight and 1 more" in message
    assert "1 tensor is left over that no part of the model takes: layers.0.ffn.ruoter.weight" in message
    assert "1 tensor is misshapen: embed.weight is [8, 8], not [288, 48]" in message
    assert caught.value.hint == "did you mean 'layers.0.ffn.ruoter.weight'?"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a herd config"),
        ('{"format": "other"}', "is not a herd config: ValueError\\(\"format 'other'\"\\)"),
        ('{"format": "herd", "version": 2, "config": {}}', "has version 2; this herd reads 1\nhint: use a newer herd"),
        ('{"format": "herd", "version": 1, "config": {}}', "is not whole: .*missing"),
        ('{"format": "herd", "version": 1, "config": {"widht": 1}}', "unknown key 'widht' in ModelConfig\nhint: did you mean 'width'?"),
    ],
)
def test_a_broken_config(content: str, message: str, folder: Path) -> None:
    (folder / save.CONFIG).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        open_source(folder)


def test_tensors_that_lie_over_each_other(tmp_path: Path) -> None:
    """As the library refuses them. Tensors without a byte lie nowhere."""
    import safetensors

    def file(**offsets: tuple[int, int]) -> Path:
        header = {name: {"dtype": "F32", "shape": [(b - a) // 4], "data_offsets": [a, b]} for name, (a, b) in offsets.items()}
        encoded = json.dumps(header).encode()
        path = tmp_path / "model.safetensors"
        path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + bytes(max(b for _, b in offsets.values())))
        return path

    assert set(safefile.read_header(file(b=(8, 16), none=(8, 8), a=(0, 8)))) == {"a", "b", "none"}
    for offsets, message in (
        ({"a": (0, 8), "b": (4, 12)}, "tensors a and b lie over each other, by 4 bytes"),
        ({"a": (0, 12), "b": (4, 8)}, "tensors a and b lie over each other, by 8 bytes"),
        ({"a": (0, 8), "b": (0, 8)}, "tensors a and b lie over each other, by 8 bytes"),
    ):
        with pytest.raises(CheckpointError, match=message):
            safefile.read_header(file(**offsets))
        with pytest.raises(safetensors.SafetensorError), safetensors.safe_open(file(**offsets), "pt"):
            pass


@pytest.mark.parametrize("header", [b"not json", b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', b'{"a": 3}'])
def test_a_broken_header(header: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(CheckpointError, match=r"has a broken header"):
        safefile.read_header(path)


# --- all or nothing


def test_a_place_that_is_taken(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"model exists already"):
        write(indexed(SCOUT), folder, "herd")
    (tmp_path / "empty").mkdir()
    write(indexed(SCOUT), tmp_path / "empty", "herd")
    assert_same(indexed(SCOUT), open_source(tmp_path / "empty"))


def test_too_little_space_is_seen_before_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    source = indexed(SCOUT)
    with pytest.raises(ResourceError, match=f"model needs {source.num_bytes:,} bytes; 1,000 are free on its disk"):
        write(source, tmp_path / "model", "herd")
    assert entries(tmp_path) == []


@pytest.mark.parametrize("to", ["herd", "hf", "meta", "gguf"])
@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), CheckpointError("torn")])
def test_nothing_half_written_stays(to: str, failure: BaseException, tmp_path: Path) -> None:
    """The disk fills, the user gives up, or the source breaks, in the middle of a tensor that comes late."""
    source = random_source(LLAMACPP)

    def fail(*_: int) -> torch.Tensor:
        raise failure

    tensors = {**source.tensors, "head.weight": replace(source.tensors["head.weight"], rows=fail)}
    broken = Source(config=source.config, tensors=tensors, files=source.files, kind="memory")
    expected: dict[type, tuple[type[BaseException], str]] = {OSError: (ResourceError, "the disk is full: .* needs [0-9,]+ bytes")}
    kind, message = expected.get(type(failure), (type(failure), "torn|^$"))
    with pytest.raises(kind, match=message):
        write(broken, tmp_path / "out" / "model", to, **({"num_shards": 2} if to == "meta" else {}))
    assert entries(tmp_path / "out") == []


def test_unknown_formats_name_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no checkpoint format is called 'ggml'\nhint: did you mean 'gguf'?"):
        write(indexed(SCOUT), tmp_path / "x", "ggml")


def test_errors_are_herds_own(tmp_path: Path) -> None:
    """Bytes of any kind in place of a checkpoint's files end in a HerdError, never in a traceback of another library."""
    noise: list[tuple[str, bytes]] = [
        *((name, content) for name in ("config.json", "params.json", "herd.json") for content in (b"", b"\xff\xfe", b"[]", b"3", b"{}")),
        ("model.gguf", b"GGUF"),
        ("model.gguf", b"GGUF" + bytes(100)),
        ("model.gguf", b"GGUF\x03\x00\x00\x00" + b"\xff" * 100),
    ]
    for i, (name, content) in enumerate(noise):
        place = tmp_path / str(i)
        place.mkdir()
        (place / name).write_bytes(content)
        with pytest.raises(HerdError):
            open_source(place)
