"""`bench/long.py` on a short prompt: a context of many chunks, in memory and in a file, answers as another road does."""

from importlib import import_module
from pathlib import Path

import pytest
import torch

from herd.ops.native import kernels

TOKENS, CHUNK = 4096, 64


@pytest.mark.skipif(kernels() is None or not Path("/proc/self/clear_refs").exists(), reason="needs the native kernels and Linux's /proc")
def test_long_contexts_answer_as_another_road_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
    long = import_module("long")
    model, tokens = long.model_config(CHUNK, 4), long.prompt_of(TOKENS)
    found = {}
    for part in ("memory", "file"):  # with every step's whole work in the file, with less in memory
        config = long.choices(tmp_path, part, TOKENS, model, 0.25, 0)
        found[part] = long.compute(tmp_path, part, tokens, model, config, thin=part == "memory")
    other = long.compute_reference(tmp_path, tokens, model)
    logits, wanted = found["memory"]["logits"], other["logits"]
    assert len(wanted) == 36 and wanted.keys() <= logits.keys()
    worst = max(long.differences(logits, wanted))
    assert worst < 0.01
    assert found["memory"]["reply"] == [int(wanted[p].argmax()) for p in range(TOKENS - 1, TOKENS + 3)]
    assert found["file"]["reply"] == found["memory"]["reply"]
    assert all(torch.equal(found["file"]["logits"][p], logits[p]) for p in logits)
    probe, without = other["without"]
    lost = long.differences(dict(enumerate(without)), dict.fromkeys(range(len(without)), wanted[probe]))
    assert sorted(lost)[len(lost) // 10] > 2 * worst, "keys that were lost would show"
    assert any("the same bits at 36 of 36" in line for line in long.report(tmp_path, TOKENS, model, 0.25))
