"""Weights are told apart, cheaply, and known again."""

import os
from pathlib import Path

import pytest
import torch

from herd.checkpoint.identity import identity_of_files, weights_identity
from herd.checkpoint.load import open_model, open_source
from herd.checkpoint.save import write
from herd.checkpoint.source import of_model
from herd.errors import CheckpointError
from herd.model.init import init_weights
from herd.model.llama4 import build
from herd.model.presets import TINY
from herd.text.tokenizer import byte_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    write(of_model(init_weights(build(TINY, device="cpu")), byte_tokenizer().files()), made, lambda _: None)
    return made


def test_files_are_known_by_content_and_time_not_by_place(folder: Path) -> None:
    first = weights_identity(folder, open_source(folder))
    assert len(first) == 32 and first == identity_of_files(folder)
    moved = folder.rename(folder.with_name("moved"))
    assert identity_of_files(moved) == first
    (moved / "notes.txt").write_text("not weights")
    assert identity_of_files(moved) == first


@pytest.mark.parametrize("at", [8, -1])
def test_a_byte_of_the_sample_counts_where_times_are_equal(folder: Path, at: int) -> None:
    path, first = folder / "model.safetensors", identity_of_files(folder)
    about, content = path.stat(), bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert identity_of_files(folder) != first


def test_time_size_and_config_count(folder: Path) -> None:
    found = {identity_of_files(folder)}
    os.utime(folder / "model.safetensors", ns=(0, 1))
    found.add(identity_of_files(folder))
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b" ")
    os.utime(folder / "model.safetensors", ns=(0, 1))
    found.add(identity_of_files(folder))
    (folder / "herd.json").write_text((folder / "herd.json").read_text() + " ")
    found.add(identity_of_files(folder))
    assert len(found) == 4


def test_parts_of_a_gguf_count_together(tmp_path: Path) -> None:
    names = ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "other.gguf"]
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    first, alone = identity_of_files(tmp_path / names[0]), identity_of_files(tmp_path / names[2])
    (tmp_path / names[1]).write_bytes(b"changed")
    assert identity_of_files(tmp_path / names[0]) != first and identity_of_files(tmp_path / names[2]) == alone


def test_weights_in_memory() -> None:
    model = init_weights(build(TINY, device="cpu"))
    first = weights_identity("tiny", of_model(model, {}))
    assert first == weights_identity("tiny", open_model("tiny"))
    with torch.no_grad():
        model.layers[1].attention.q.weight[3, 5] += 1e-3
    assert weights_identity("tiny", of_model(model, {})) != first


def test_a_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no weights"):
        identity_of_files(tmp_path)
