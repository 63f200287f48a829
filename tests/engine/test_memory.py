"""How much memory a served model takes, and that its weights are shared between processes: read from /proc of processes that hold one."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from herd.checkpoint.store import home
from herd.engine.local import Model

pytestmark = [pytest.mark.weights, pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's /proc")]


HOLD = """
import sys
from herd.engine.local import load
model = load("cria", kv_gib=0.05)
print(model.generate("The capital of France is", temperature=0, max_tokens=64).text, flush=True)
layers = model.thread.engine.pages.layers
print(sum(t.nbytes for slots in layers for t in (slots.keys, slots.values)), flush=True)
sys.stdin.readline()
"""


def sizes(pid: int, only: str = "") -> dict[str, int]:
    """Bytes by kind ("Rss", "Pss", "Shared_Clean", ...) of a process's mappings, of those alone whose line ends with `only`."""
    found: dict[str, int] = {}
    is_wanted = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        head, *rest = line.split()
        if not head.endswith(":"):
            is_wanted = line.endswith(only)
        elif is_wanted and rest[-1] == "kB":
            found[head[:-1]] = found.get(head[:-1], 0) + int(rest[0]) * 1024
    return found


@pytest.fixture
def holders(cria: Model) -> Iterator[list[tuple[int, int]]]:
    """Two processes that hold the default model and have answered with it: their ids, and the bytes of their pages for keys and values."""
    del cria  # it is here: no need for the processes to fetch it
    running = [subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        ready = []
        for process in running:
            assert process.stdout
            lines = [process.stdout.readline()]
            while not lines[-1].strip().isdigit():
                assert lines[-1], "the process ended"
                lines.append(process.stdout.readline())
            ready.append((process.pid, int(lines[-1])))
        yield ready
    finally:
        for process in running:
            assert process.stdin
            process.stdin.close()
            process.wait(30)


def test_a_model_takes_its_file_and_little_more(holders: list[tuple[int, int]]) -> None:
    """Resident: the file, the keys and values, and 300 MB for Python, torch and everything else."""
    file = home() / "models" / "cria" / "model.safetensors"
    for pid, kv_bytes in holders:
        assert sizes(pid)["Rss"] <= file.stat().st_size + kv_bytes + 300e6


def test_weights_are_shared_between_processes(holders: list[tuple[int, int]]) -> None:
    """Of what both have mapped of the file each counts as half: one copy is in memory."""
    for pid, _ in holders:
        weights = sizes(pid, str(Path("models", "cria", "model.safetensors")))
        assert weights["Rss"] > 0.9 * (home() / "models" / "cria" / "model.safetensors").stat().st_size
        assert weights["Pss"] <= 0.55 * weights["Rss"]
        assert weights["Private_Dirty"] == 0, "no page was written, and so copied"
