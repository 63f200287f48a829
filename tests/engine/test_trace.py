"""The trace: it parses whatever happens, its slices nest, and what it says of steps and sequences is what happened."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import defaultdict
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import pytest

import herd
from herd.chat import Done, Sampling
from herd.cli.main import main
from herd.engine.config import EngineConfig
from herd.engine.engine import Engine
from herd.engine.local import Model
from herd.engine.trace import TraceFile
from herd.errors import HerdError, UsageError
from tests.engine.made import make_engine, plain_prompt, shrink

Event = dict[str, Any]
PARTS = ("plan", "see", "run", "sample", "accept")


def slices(events: list[Event], pid: int = 1) -> dict[int, list[Event]]:
    """Complete events by row, checked to nest: any two are apart or one lies within the other."""
    rows: dict[int, list[Event]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X" and event["pid"] == pid:
            rows[event["tid"]].append(event)
    for row in rows.values():
        row.sort(key=lambda e: (e["ts"], -e["dur"]))
        open_until: list[float] = []
        for event in row:
            while open_until and event["ts"] >= open_until[-1] - 1e-6:
                open_until.pop()
            assert not open_until or event["ts"] + event["dur"] <= open_until[-1] + 1e-6, event
            open_until.append(event["ts"] + event["dur"])
    return rows


def run(engine: Engine) -> list[tuple[Any, Any]]:
    events = []
    while not engine.scheduler.is_idle:
        events += engine.step()
    return events


def test_slices_nest_and_sum_to_the_seconds_of_steps(tiny: Model, tmp_path: Path) -> None:
    file = TraceFile(tmp_path / "trace.json")
    engine = make_engine(tiny, max_sequences=3, context_tokens=96, step_tokens=24, pace=0)
    shrink(engine, full=28, local=9)
    engine.trace = file.engine("tiny")
    rng = random.Random(0)
    sequences = []
    for n in (40, 50, 30, 40, 9):
        prompt = plain_prompt([rng.randrange(256) for _ in range(n)])
        sequences.append(engine.sequence(prompt, Sampling(temperature=0, max_tokens=20, ignore_eos=True), lambda event: None))
        engine.scheduler.add(sequences[-1])
    for _ in range(6):
        engine.step()
    aborted = engine.scheduler.running[0]
    engine.remove(aborted)
    engine.remove(aborted)
    done = {sequence: event for sequence, event in run(engine) if isinstance(event, Done)}
    stats = engine.stats()
    events = json.loads((tmp_path / "trace.json").read_text())

    rows = slices(events)
    steps = [event for event in rows[0] if event["name"] == "step"]
    assert [event["args"]["step"] for event in steps] == list(range(1, stats.num_steps + 1))
    for part in PARTS:
        total_us = sum(event["dur"] for event in rows[0] if event["name"] == part)
        assert total_us == pytest.approx(stats.seconds[part] * 1e6, rel=1e-3, abs=1)
    assert sum(event["dur"] for event in steps) == pytest.approx(sum(stats.seconds.values()) * 1e6, rel=1e-4)
    for step in steps:
        inside = [e for e in rows[0] if e["name"] in PARTS and step["ts"] <= e["ts"] < step["ts"] + step["dur"]]
        assert [e["name"] for e in inside] == list(PARTS)
        assert sum(e["dur"] for e in inside) == pytest.approx(step["dur"], abs=0.01)

    ends = {event["tid"]: event for event in events if event["ph"] == "i"}
    assert sorted(event["name"] for event in ends.values()) == ["aborted", *["end"] * 4]
    assert stats.num_preempted and any(e["name"] == "waiting" for row in rows.values() for e in row)
    generated = 0
    for tid, end in ends.items():
        row = rows[tid]
        assert row[0]["name"] == "queued" and all(a["ts"] + a["dur"] <= b["ts"] + 1e-6 for a, b in pairwise(row))
        assert {e["name"] for e in row} <= {"queued", "prefill", "waiting", "decode"}
        if end["name"] == "end":
            assert sum(e["name"] == "queued" for e in row) == 1
            first = [e for e in row if e["name"] == "prefill"]
            assert first and first[-1]["args"]["to"] >= end["args"]["prompt_tokens"]
            tokens = sum(e["args"]["tokens"] for e in row if e["name"] == "decode")
            assert tokens + 1 == end["args"]["completion_tokens"] == 20  # one comes of the prompt itself
            generated += tokens + 1
    assert generated == sum(event.usage.completion_tokens for event in done.values()) == 80
    accepted = sum(e["args"]["accepted"] for row in rows.values() for e in row if e["name"] == "decode")
    assert accepted == stats.accepted_tokens
    counted = [event["args"] for event in events if event["ph"] == "C" and event["name"] == "global pages"]
    assert all(sum(pages.values()) == 28 for pages in counted) and counted[-1]["used"] == 0
    assert all(sequence.row is None for sequence in sequences)


def test_decoding_is_cut_into_slices_of_a_second(tiny: Model, tmp_path: Path) -> None:
    """By a clock of which every look takes 0.1 s: six looks, and so half a second, in a step, and 0.1 s between two."""
    looks = count()
    engine = Engine(tiny.llama4, tiny.tokenizer, EngineConfig(kv_gib=0.01, draft_tokens=0), clock=lambda: next(looks) / 10)
    engine.trace = TraceFile(tmp_path / "trace.json").engine("tiny", clock_start=0.0)
    engine.scheduler.add(engine.sequence(plain_prompt([1, 2, 3]), Sampling(max_tokens=10, ignore_eos=True), lambda event: None))
    run(engine)
    row = slices(json.loads((tmp_path / "trace.json").read_text()))[1]
    decode = [event for event in row if event["name"] == "decode"]
    assert [event["args"]["tokens"] for event in decode] == [2, 2, 2, 2, 1]
    assert [event["dur"] for event in decode] == pytest.approx([1.1e6] * 4 + [0.5e6])


def test_the_file_is_whole_at_every_moment(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    file = TraceFile(path)
    assert json.loads(path.read_text()) == []
    trace = file.engine('a "name"\n')
    again = file.engine('a "name"\n')
    assert again is trace and json.loads(path.read_text())[0]["args"]["name"] == 'a "name"\n'
    for i in range(3):
        file.write([json.dumps({"i": i}), '{"ü":1}'])
        assert json.loads(path.read_text())[-2:] == [{"i": i}, {"ü": 1}]
    file.close()
    file.write(['{"late":1}'])
    assert {"late": 1} not in json.loads(path.read_text())


def test_the_last_part_is_kept_within_the_limit(tiny: Model, tmp_path: Path) -> None:
    path, limit = tmp_path / "trace.json", 40_000
    file = TraceFile(path, limit_bytes=limit)
    engine = make_engine(tiny)
    engine.trace = file.engine("tiny")
    sampling = Sampling(temperature=0, max_tokens=300, ignore_eos=True)
    for i in range(2):
        engine.scheduler.add(engine.sequence(plain_prompt([i, 2, 3]), sampling, lambda event: None))
    while not engine.scheduler.is_idle:
        engine.step()
        engine.trace.flush()
    files = [tmp_path / "trace.1.json", path]
    assert sorted(tmp_path.iterdir()) == sorted(files) and file.generation > 2
    assert sum(each.stat().st_size for each in files) < 1.1 * limit
    steps: list[int] = []
    for each in files:
        events = json.loads(each.read_text())
        named = {event["tid"] for event in events if event["name"] == "thread_name"}
        assert events[0]["args"]["name"] == "tiny" and {event["tid"] for event in events if event["ph"] == "X"} <= named
        steps += [event["args"]["step"] for event in events if event["name"] == "step"]
    assert steps == list(range(steps[0], engine.stats().num_steps + 1))  # without a gap, to the end


def test_a_disk_that_is_full_ends_the_trace_and_nothing_else(
    tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(tiny)
    engine.trace = TraceFile(tmp_path / "trace.json").engine("tiny")
    write = os.pwrite
    monkeypatch.setattr("os.pwrite", lambda fd, data, at: write(fd, data[:100], at))
    engine.scheduler.add(engine.sequence(plain_prompt([1, 2]), Sampling(max_tokens=5, ignore_eos=True), lambda event: None))
    assert any(isinstance(event, Done) for _, event in run(engine))
    assert json.loads((tmp_path / "trace.json").read_text())
    assert sum("ends here" in record.message for record in caplog.records) == 1


def test_where_no_trace_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no plain file"):
        TraceFile(Path("/dev/null"))
    with pytest.raises(IsADirectoryError):
        TraceFile(tmp_path)


def test_a_failed_sequence_and_two_engines_in_one_file(tmp_path: Path) -> None:
    file = TraceFile(tmp_path / "trace.json")
    models = [herd.load("tiny", kv_gib=0.01, trace=file) for _ in range(2)]
    models[0].generate("x", max_tokens=3).text  # noqa: B018
    assert models[0].unload()
    reply = models[0].generate("x", max_tokens=200, ignore_eos=True, temperature=0)  # its engine came back: rows go on
    engine = models[0].thread.engine

    def fail(logits: object, drafts: object) -> list[int]:
        raise HerdError('no "number"')

    for sequence in [reply._held[1]]:  # type: ignore[index]
        sequence.sampler.draw = fail  # type: ignore[method-assign]
    with pytest.raises(HerdError, match="number"):
        reply.text  # noqa: B018
    engine.close()
    events = json.loads((tmp_path / "trace.json").read_text())
    assert [event["args"]["error"] for event in events if event["name"] == "failed"] == ['no "number"']
    names = [event["args"]["name"] for event in events if event["name"] == "thread_name"]
    assert len(names) == len(set(names)) and names[1:] == ["sequence 1: 2 tokens", "sequence 2: 2 tokens"]
    slices(events)


KILLED = """
import sys, herd
from herd.engine.trace import TraceFile
from pathlib import Path
model = herd.load("tiny", kv_gib=0.01, trace=TraceFile(Path(sys.argv[1])))
print("ready", flush=True)
while True:
    model.generate("x", max_tokens=400, ignore_eos=True).text
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_what_a_killed_process_leaves_parses(how: signal.Signals, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout and process.stdout.readline() == "ready\n"
        end = time.monotonic() + 20
        while path.stat().st_size < 100_000 and time.monotonic() < end:
            time.sleep(0.01)
            json.loads(path.read_text() if random.random() < 0.2 else "[]")  # while it is written to
        process.send_signal(how)
        process.wait(20)
    finally:
        process.kill()
        process.stdout.close()  # type: ignore[union-attr]
    rows = slices(json.loads(path.read_text()))
    assert len([event for event in rows[0] if event["name"] == "step"]) > 50


@pytest.mark.parametrize("verb", ["generate", "bench"])
def test_the_command_line_writes_one(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("herd.log.log.handlers", [])
    path = tmp_path / "trace.json"
    words = ["tiny", "hey", "--max-tokens", "4"] if verb == "generate" else ["tiny", "--rounds", "1", "--prefill", "16", "--decode", "4"]
    assert main([verb, *words, "--kv-gib", "0.01", "--trace", str(path)]) == 0
    assert {"step", "prefill", "decode", "end"} <= {event["name"] for event in json.loads(path.read_text())}
