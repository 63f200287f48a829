"""Broken files of every format end in a `HerdError`, never in anything else: cut short, bytes turned over, values of the wrong type."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from herd.checkpoint.convert import write
from herd.checkpoint.load import load_model, open_source
from herd.checkpoint.quantize import quantized_fp8
from herd.errors import CheckpointError, HerdError
from tests.checkpoint.made import LLAMACPP, random_source

KINDS = ["herd", "hf", "meta", "gguf"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One good checkpoint of each kind."""
    folder = tmp_path_factory.mktemp("whole")
    for kind in KINDS:
        write(
            random_source(LLAMACPP),
            folder / (f"{kind}.gguf" if kind == "gguf" else kind),
            kind,
            **({"num_shards": 2} if kind == "meta" else {}),
        )
    for kind in ("herd", "hf"):
        write(quantized_fp8(random_source(LLAMACPP)), folder / f"{kind}-fp8", kind)
    return {path.stem: path for path in folder.iterdir()}


def copy(source: Path, place: Path) -> Path:
    return Path(shutil.copy(source, place)) if source.is_file() else Path(shutil.copytree(source, place))


def opens_or_says_why(path: Path) -> None:
    try:
        open_source(path)
    except HerdError as error:
        assert str(path) in error.message or path.name in error.message, error.message


@pytest.mark.parametrize("kind", [*KINDS, "herd-fp8", "hf-fp8"])
def test_files_cut_short_or_turned_over(whole: dict[str, Path], kind: str, tmp_path: Path) -> None:
    rng = random.Random(0)
    for trial in range(25):
        path = copy(whole[kind], tmp_path / f"trial-{trial}")
        files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.stat().st_size)
        victim = rng.choice(files)
        data = bytearray(victim.read_bytes())
        if trial % 2:
            data = data[: rng.choice([0, len(data) // 10, len(data) // 2, len(data) - 1])]
        else:
            for _ in range(8):
                data[rng.randrange(min(len(data), 4096))] ^= 1 << rng.randrange(8)
        victim.write_bytes(data)
        opens_or_says_why(path)


@pytest.mark.parametrize("value", [None, "x", -1, 0, 10**12, [], {}], ids=str)
@pytest.mark.parametrize("kind", ["herd", "hf", "meta"])
def test_values_of_the_wrong_kind(whole: dict[str, Path], kind: str, value: Any, tmp_path: Path) -> None:
    name = {"herd": "herd.json", "hf": "config.json", "meta": "params.json"}[kind]
    path = copy(whole[kind], tmp_path / "model")
    facts = json.loads((path / name).read_text())
    inner = facts["config"] if kind == "herd" else facts.get("text_config", facts)
    for key in list(inner):
        before, inner[key] = inner[key], value
        (path / name).write_text(json.dumps(facts))
        opens_or_says_why(path)
        inner[key] = before


def test_nested_too_deep(whole: dict[str, Path], tmp_path: Path) -> None:
    path = copy(whole["hf"], tmp_path / "model")
    (path / "config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError):
        open_source(path)


def test_a_greedy_model_is_written_so_that_transformers_takes_it(tmp_path: Path) -> None:
    from dataclasses import replace

    from transformers import GenerationConfig

    config = replace(LLAMACPP, advised_temperature=0.0, advised_top_p=1.0)
    write(replace(random_source(LLAMACPP), config=config), tmp_path / "hf", "hf")
    read = GenerationConfig.from_pretrained(tmp_path / "hf")
    read.validate()
    assert read.do_sample is False
    assert load_model(tmp_path / "hf")[1].config.advised_temperature == 0.0
