"""Prefixes over a restart: what one engine has finished another takes from the disk, and answers the same."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from herd.chat import Sampling
from herd.engine.config import EngineConfig
from herd.engine.local import Model
from herd.engine.opening import open_engine
from herd.engine.sequence import Sequence
from herd.errors import UsageError
from herd.text.prompt import Prompt

PROMPT = [(7 * i * i + 3) % 256 for i in range(70)]  # tiny has chunks of 16 tokens: four and a half of them


def start(folder: Path, **choices: Any) -> Any:
    return open_engine("tiny", config=EngineConfig(prefix_folder=folder, page_tokens=4, kv_gib=0.01, **choices), device="cpu")


def ask(engine: Any, tokens: list[int], max_tokens: int = 12, salt: bytes = b"") -> tuple[list[int], int]:
    """The greedy reply, and how many tokens of the prompt did not have to be computed."""
    prompt = Prompt(tokens=tokens, loss_mask=[False] * len(tokens))
    sequence: Sequence = engine.sequence(prompt, Sampling(temperature=0, max_tokens=max_tokens, ignore_eos=True), lambda _: None, salt)
    engine.scheduler.add(sequence)
    while not engine.scheduler.is_idle:
        engine.step()
    if engine.shelf:
        engine.shelf.store.flush()
    return sequence.tokens[len(tokens) :], sequence.num_cached


@pytest.mark.parametrize("kv", ["fp32", "fp16", "bf16", "int8"])
def test_a_prefix_comes_back_after_a_restart(tmp_path: Path, kv: str) -> None:
    want, cached = ask(start(tmp_path, kv=kv), PROMPT)
    assert cached == 0
    again = start(tmp_path, kv=kv)
    assert ask(again, PROMPT) == (want, 64)
    assert again.stats().restored_tokens == 64 and again.stats().disk.hits == 4
    assert ask(again, PROMPT) == (want, 68), "and is in memory then, with the pages of the last chunk"
    longer = PROMPT + want[:4]  # the reply has gone on to the middle of a chunk; its first chunks are the same
    assert ask(start(tmp_path, kv=kv), longer)[0][:8] == want[4:]


def test_only_what_is_the_same_comes_back(tmp_path: Path) -> None:
    """Another beginning, salt, page size, or kind of keys: computed anew, and rightly."""
    want, _ = ask(start(tmp_path), PROMPT)
    other = [PROMPT[0] + 1, *PROMPT[1:]]
    assert ask(start(tmp_path), other)[1] == 0
    assert ask(start(tmp_path), PROMPT, salt=b"somebody else") == (want, 0)
    assert ask(start(tmp_path, kv="bf16"), PROMPT)[1] == 0
    fork = PROMPT[:40] + other[:20]
    assert ask(start(tmp_path), fork)[1] == 32, "as far as whole chunks are the same"


def test_a_damaged_file_costs_the_rest_of_the_chain(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    want, _ = ask(start(tmp_path), PROMPT)
    files = sorted((file for file in tmp_path.rglob("*") if file.is_file() and file.stat().st_size > 1000), key=lambda f: f.stat().st_mtime)
    assert len(files) >= 4
    for file in files:
        content = bytearray(file.read_bytes())
        content[-100] ^= 1
        file.write_bytes(content)
    reply, cached = ask(start(tmp_path), PROMPT)
    assert reply == want and cached == 0


def test_with_little_room_the_first_chunks_come_back(tmp_path: Path) -> None:
    """Room for fewer pages than the prefix has: no page of it pushes out another, and the reply is the same."""
    want, _ = ask(start(tmp_path), PROMPT)
    engine = start(tmp_path)
    held = engine.pages.full.take(engine.pages.full.room - 22)  # 17 are needed for the prompt itself, 3 for the reply
    assert ask(engine, PROMPT)[0] == want
    engine.pages.full.give_back(held)
    assert engine.pages.full.room == engine.pages.full.num_pages


def test_a_model_that_keeps_nothing_says_so(tmp_path: Path, cria: Model, caplog: pytest.LogCaptureFixture) -> None:
    del cria
    engine = open_engine("cria", config=EngineConfig(prefix_folder=tmp_path, kv_gib=0.05), device="cpu")
    assert engine.shelf is None and "of no use" in caplog.text


def test_a_folder_without_a_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="prefix_cache is off"):
        replace(EngineConfig(), prefix_folder=tmp_path, prefix_cache=False)
