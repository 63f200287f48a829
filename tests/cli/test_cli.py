"""The command line, run as a user runs it: what it prints, where, and how it ends."""

import io
import json
import socket
import struct
from pathlib import Path

import PIL.Image
import pytest
import torch

from herd.checkpoint.load import open_source
from herd.cli.inspect import ops_report
from herd.cli.main import VERBS, main
from herd.cli.terminal.said import parse
from herd.ops.native import kernels
from herd.ops.pick import OPS, TABLE, ways


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of `herd args`."""
    try:
        code = main(list(args))
    except SystemExit as exit:  # from the option parser
        code = int(exit.code or 0)
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the herd logger as it was."""
    monkeypatch.setattr("herd.log.log.handlers", [])
    monkeypatch.setattr("herd.log.log.propagate", True)


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    for args in ([], ["--help"], ["-h"], ["help"]):
        code, out, _ = run(capsys, *args)
        assert code == 0 and all(verb in out for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    code, out, _ = run(capsys, verb, "--help")
    assert code == 0 and f"herd {verb}" in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version")[:2] == (0, "herd 0.1.0\n")


def test_unknown_verb_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "inspct")
    assert (code, out) == (2, "")
    assert "'inspct'" in err and "hint: did you mean 'inspect'?" in err


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        (
            "scout",
            ["107,769,861,120", "871,932,416", "108,641,793,536", "17,172,894,720", "36 local (chunk 8,192), 12 global", "481.12", "49.12"],
        ),
        ("maverick", ["400,711,848,960", "17,184,691,200", "128 experts in 24 layers", "past its context of 1,048,576"]),
        ("guard", ["12,001,097,216", "dense"]),
        ("behemoth", ["16 experts in 128 layers"]),
        ("cria", ["134,515,008", "text only"]),
    ],
)
def test_inspect(capsys: pytest.CaptureFixture[str], name: str, lines: list[str]) -> None:
    code, out, _ = run(capsys, "inspect", name)
    assert code == 0
    for line in [*lines, "bf16", "fp8", "int4", "KV at 8K", "KV at 128K", "KV at 1M", "KV at 10M", "int8"]:
        assert line in out


def test_inspect_ops(capsys: pytest.CaptureFixture[str]) -> None:
    """Every row of the table, aligned; what runs here is marked and agrees with what is dispatched."""
    code, out, _ = run(capsys, "inspect", "--ops")
    assert code == 0
    lines = out.splitlines()
    place = lines[2].index("device")
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    for op in OPS:
        first = next(i for i, line in enumerate(lines) if line.startswith(f"{op}: ")) + 1
        rows = lines[first : first + sum(way.op == op for way in TABLE)]
        assert all(row[place - 1] == " " and row[place] != " " for row in rows)
        marked = [row[1:place].strip() for row in rows if row.startswith("*")]
        found = [way.name for way in ways(op, device, dtype)]
        assert marked and marked == found[: len(marked)]
    if not torch.cuda.is_available():
        assert "no CUDA device" in out
    native = kernels()
    assert f"built, {native.path} instructions" in out if native else "not built" in out or "HERD_NATIVE=off" in out


def test_inspect_ops_on_a_gpu_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (8, 6))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
    monkeypatch.setattr("herd.cli.inspect.ways", ways.__wrapped__)
    text = "\n".join(ops_report())
    assert "on a GPU, bf16" in text and "compute capability 8.6; it wants 9.x or 10.x" in text


def test_generate(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    args = ("--temperature", "0", "--max-tokens", "12")
    code, out, _ = run(capsys, "generate", "tiny", "Hello", *args)
    assert code == 0 and out.endswith("\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello"))
    assert run(capsys, "generate", "tiny", "-", *args)[:2] == (0, out)


def test_chat_from_a_pipe_with_an_image(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    args = ("chat", "tiny", "--temperature", "0", "--max-tokens", "16", "--ignore-eos")
    replies = set()
    for color in ("red", "blue"):
        PIL.Image.new("RGB", (56, 56), color).save(tmp_path / "color.png")
        monkeypatch.setattr("sys.stdin", io.StringIO(f"what is\n@{tmp_path / 'color.png'} this?"))
        code, out, err = run(capsys, *args)
        assert code == 0, err
        replies.add(out)
    assert len(replies) == 2


@pytest.mark.parametrize("text", ["", " \n\n"])
def test_chat_from_an_empty_pipe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Nothing was asked: nothing is loaded and nothing said."""
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert run(capsys, "chat", "no-such-model") == (0, "", "stdin held no message, so there is nothing to answer\n")


def test_convert_there_and_back(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(capsys, "convert", "tiny", str(tmp_path / "hf"), "--to", "hf")[0] == 0
    assert run(capsys, "convert", str(tmp_path / "hf"), str(tmp_path / "herd"), "--to", "herd")[0] == 0
    assert open_source(tmp_path / "herd").config == open_source(tmp_path / "hf").config
    code, out, _ = run(capsys, "inspect", str(tmp_path / "herd"))
    assert code == 0 and "chunk 16" in out


def pickle_with_code(folder: Path) -> Path:
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps({"dim": 64, "n_layers": 1, "n_heads": 4, "vocab_size": 64}))
    (folder / "consolidated.00.pth").write_bytes(b"cos\nsystem\n(S'touch " + str(folder / "harmed").encode() + b"'\ntR.")
    return folder


def bad_hugging_face(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}))
    return folder


def truncated(folder: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert run(capsys, "convert", "tiny", str(folder), "--to", "herd")[0] == 0
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return folder


def reshaped(folder: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert run(capsys, "convert", "tiny", str(folder), "--to", "herd")[0] == 0
    file = folder / "model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + length].replace(b'"norm.weight":{"dtype":"F32","shape":[64]', b'"norm.weight":{"dtype":"F32","shape":[8,8]')
    file.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    return folder


def test_bad_checkpoints(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Each ends with one error of two lines, code 1 (or 2 for a name that leads nowhere), and runs nothing."""
    cases = {
        str(tmp_path / "nowhere"): (2, "does not exist"),
        "scuot": (2, "scuot"),
        "maverick": (2, "licence"),
        str(bad_hugging_face(tmp_path / "other")): (1, "qwen3"),
        str(pickle_with_code(tmp_path / "pickle")): (1, "consolidated.00.pth"),
        str(truncated(tmp_path / "short", capsys)): (1, "model.safetensors"),
        str(reshaped(tmp_path / "shape", capsys)): (1, "norm.weight"),
    }
    for model, (code, words) in cases.items():
        got, out, err = run(capsys, "generate", model, "x")
        assert (got, out) == (code, ""), (model, err)
        assert words in err and err.startswith("error: ") and "Traceback" not in err, err
    assert not (tmp_path / "pickle" / "harmed").exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("generate",), "words"),
        (("generate", "cria"), "name of a model"),
        (("bench", "tiny", "--decode", "1"), "decode is 1"),
        (("bench", "tiny", "--prefill", "0"), "prefill is 0"),
        (("generate", "tiny", "a", "b"), "quotes"),
        (("generate", "tiny", "x" * 3000), "3,000 tokens"),
        (("generate", "tiny", "x", "--temperature", "7"), "temperature is 7"),
        (("generate", "tiny", "x", "--tempature", "1"), "temperature"),
        (("convert", "tiny", "/tmp", "--to", "hf"), "/tmp"),
        (("convert", "tiny", "x", "--to", "onnx"), "onnx"),
        (("serve", "tiny", "--port", "99999"), "65535"),
        (("pull", "scout"), "scout"),
    ],
)
def test_misuse_is_code_2(capsys: pytest.CaptureFixture[str], args: tuple[str, ...], words: str) -> None:
    code, out, err = run(capsys, *args)
    assert (code, out) == (2, ""), err
    assert words in err and "Traceback" not in err


@pytest.mark.parametrize("word", ["x~y", "(~50", "@~nobody-here", "@" + "a" * 300, "me@example.org", "@", "@name"])
def test_words_with_at_and_tilde_are_words(word: str) -> None:
    assert parse(f"say {word} now").content == (f"say {word} now",)


def test_what_follows_two_dashes_is_taken_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    args = ("generate", "--temperature", "0", "--max-tokens", "4", "--stop", "zz", "--stop", "qq")
    code, out, err = run(capsys, *args, "tiny", "--", "-hello")
    assert code == 0, err
    assert out == run(capsys, "generate", "tiny", "--max-tokens", "4", "--temperature", "0", "--", "-hello")[1]


def test_disks_and_paths_end_in_two_lines(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for args in (
        ("convert", "tiny", str(tmp_path / "file" / "x"), "--to", "herd"),
        ("inspect", "/dev/null"),
        ("inspect", "x" * 300),
        ("inspect", "~nobody-here/x"),
    ):
        code, out, err = run(capsys, *args)
        assert code in (1, 2) and out == "" and err.startswith("error: ") and "hint: " in err, err


def test_convert_into_the_folder_that_one_is_in(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "convert", "tiny", ".", "--to", "herd")[0] == 0
    assert open_source(tmp_path).config.num_layers == 4


def test_bad_images(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    for name, words in (("broken.png", "image"), ("missing.png", "missing.png")):
        monkeypatch.setattr("sys.stdin", io.StringIO(f"@{tmp_path / name}"))
        code, out, err = run(capsys, "chat", "tiny")
        assert (code, out) == (2, "") and words in err, err


def test_a_taken_port_is_found_before_the_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = run(capsys, "serve", "no-such-model", "--port", str(port))
    assert code == 1 and f"port {port} on 127.0.0.1 is in use" in err and "hint: give another with --port" in err
