"""What the README and the server's greeting tell a newcomer to type works as it stands."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from herd.cli.main import VERBS
from herd.cli.serve import GREETING
from herd.engine.local import Local, Model

from .serve.conftest import live

README = (Path(__file__).parent.parent / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_commands_exist() -> None:
    verbs = set(re.findall(r"herd ([a-z]+)", " ".join(re.findall(r"`([^`]*)`", README))))
    assert verbs <= set(VERBS) and {"serve", "chat", "generate", "inspect", "convert"} <= verbs
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    for target in re.findall(r"^    make ([a-z]+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile


def test_files_exist() -> None:
    root = Path(__file__).parent.parent
    for name in re.findall(r"`(herd/[\w/]+\.py)`", README + (root / "docs" / "tour.md").read_text()):
        assert (root / name).is_file(), name


def python(code: str) -> str:
    """What a snippet prints, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.weights
def test_the_client_snippet_gets_paris(cria: Model) -> None:
    with live(Local([cria])) as server:
        assert "Paris" in python(SNIPPETS[0].replace("http://127.0.0.1:8000", server.url))


@pytest.mark.weights
def test_the_python_snippet(cria: Model) -> None:
    out = python(SNIPPETS[1])
    assert "Paris" in out and "(" in out


@pytest.mark.weights
def test_the_greeting_works_as_it_stands(cria: Model) -> None:
    with live(Local([cria])) as server:
        text = GREETING.format(names="cria", first="cria", url=server.url)
        snippet = "\n".join(line.strip() for line in text[text.index("  from openai") : text.index("Ctrl-C")].splitlines())
        assert "Paris" in python(snippet)
        if shutil.which("curl"):
            command = text[text.index("  curl") : text.index("  from openai")]
            done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
            assert "Paris" in done.stdout, done.stderr


@pytest.mark.weights
def test_streaming_gets_paris(cria: Model) -> None:
    import openai

    with live(Local([cria])) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
        stream = client.chat.completions.create(
            model="cria", messages=[{"role": "user", "content": "What is the capital of France?"}], stream=True
        )
        assert "Paris" in "".join(chunk.choices[0].delta.content or "" for chunk in stream)
