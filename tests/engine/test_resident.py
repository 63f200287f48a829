"""Engines that come when they are asked for, go when they are idle, and leave nothing behind; and several of them at once."""

import asyncio
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest

import herd
from herd.chat import ChatRequest, Message, Sampling, Text
from herd.checkpoint.quantize import quantize_checkpoint
from herd.engine.config import EngineConfig
from herd.engine.engine import Engine
from herd.engine.local import Local, Model
from herd.engine.opening import open_engine
from herd.engine.resident import Resident
from herd.errors import HerdError, UsageError
from herd.ops.native import kernels
from tests.clock import until
from tests.serve.conftest import live

from .greedy import greedy_reply
from .made import plain_prompt

SMALL = EngineConfig(kv_gib=0.01)


class Opener:
    """Makes tiny engines, and counts them."""

    def __init__(self, seconds: float = 0.0, failures: int = 0) -> None:
        self.seconds, self.failures, self.num_made = seconds, failures, 0
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def __call__(self) -> Engine:
        self.num_made += 1
        time.sleep(self.seconds)
        assert self.may_go_on.wait(10)
        if self.failures:
            self.failures -= 1
            raise HerdError("no luck")
        return open_engine("tiny", config=SMALL, device="cpu")


@pytest.fixture
def opened() -> Iterator[Callable[..., Model]]:
    """Models over an opener, unloaded with the test."""
    made: list[Model] = []

    def model(opener: Opener, name: str = "tiny", **choices: float) -> Model:
        made.append(Model(Resident(name, opener, **choices)))
        return made[-1]

    yield model
    for each in made:
        assert until(each.unload)


def ask(model: str, words: str = "hey", max_tokens: int = 9) -> ChatRequest:
    sampling = Sampling(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    return ChatRequest(model=model, messages=(Message(role="user", content=(words,)),), sampling=sampling)


async def answer(backend: Local, request: ChatRequest) -> str:
    return "".join([event.text async for event in backend.chat(request) if isinstance(event, Text)])


def test_what_was_unloaded_comes_back_and_answers_the_same(opened: Callable[..., Model]) -> None:
    model = opened(opener := Opener())
    assert (model.state, model.stats(), opener.num_made) == ("unloaded", None, 0)
    want = model.generate("Hello", temperature=0, max_tokens=20).tokens
    assert list(want) == greedy_reply(model, plain_prompt([256, *b"Hello"]), 20)
    assert model.state == "loaded" and model.stats() and opener.num_made == 1
    for _ in range(2):
        assert model.unload() and model.unload()
        assert model.state == "unloaded"
        assert model.generate("Hello", temperature=0, max_tokens=20).tokens == want
    assert opener.num_made == 3


def test_a_reply_under_way_keeps_its_engine(opened: Callable[..., Model]) -> None:
    model = opened(Opener(), idle_s=0.05)
    reply = model.generate("x", max_tokens=900, ignore_eos=True)
    next(reply)
    assert not model.unload()
    time.sleep(0.2)
    assert model.state == "loaded"
    reply.close()
    assert until(lambda: model.state == "unloaded")
    finished = model.generate("x", max_tokens=3)
    assert finished.text is not None and finished.tokens
    assert model.unload()  # a reply that has ended holds nothing


def test_an_idle_engine_goes_by_the_clock(opened: Callable[..., Model]) -> None:
    now = 0.0
    model = opened(opener := Opener(), idle_s=0.02, clock=lambda: now)
    model.load()
    time.sleep(0.2)
    assert model.state == "loaded"
    model.generate("x", max_tokens=2).text  # noqa: B018
    now = 0.019
    time.sleep(0.1)
    assert model.state == "loaded"
    now = 0.021
    assert until(lambda: model.state == "unloaded") and opener.num_made == 1


def test_many_who_ask_at_once_load_once(opened: Callable[..., Model]) -> None:
    model = opened(opener := Opener(seconds=0.1))
    replies: list[tuple[int, ...]] = []
    threads = [threading.Thread(target=lambda: replies.append(model.generate("x", temperature=0, max_tokens=5).tokens)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert opener.num_made == 1 and len(replies) == 6 and len(set(replies)) == 1


def test_requests_wait_for_the_load_and_others_do_not_wait_for_them(opened: Callable[..., Model]) -> None:
    """Twenty requests for a model that is loading, more than asyncio has threads, and one for a model that is there."""
    slow, there = opened(opener := Opener(), "slow"), opened(Opener(), "there")
    there.load()
    opener.may_go_on.clear()
    backend = Local([slow, there])

    async def run() -> list[str]:
        waiting = [asyncio.create_task(answer(backend, ask("slow"))) for _ in range(20)]
        await asyncio.sleep(0.05)
        assert await asyncio.wait_for(answer(backend, ask("there")), 10)
        assert backend.states() == {"slow": "loading", "there": "loaded"} and backend.is_healthy()
        waiting.pop().cancel()
        opener.may_go_on.set()
        return await asyncio.gather(*waiting)

    replies = asyncio.run(run())
    assert opener.num_made == 1 and set(replies) == {there.chat("hey", temperature=0, max_tokens=9, ignore_eos=True).text}
    assert until(slow.unload)  # who went away while it was loading holds nothing


def test_a_load_that_fails_is_told_and_tried_again(opened: Callable[..., Model]) -> None:
    model = opened(opener := Opener(failures=2))
    with pytest.raises(HerdError, match="no luck"):
        model.generate("x")
    with pytest.raises(HerdError, match="no luck"):
        asyncio.run(answer(Local([model]), ask("tiny")))
    assert (model.state, Local([model]).is_healthy()) == ("unloaded", True)
    assert model.generate("x", max_tokens=2).tokens and opener.num_made == 3


def test_never_two_engines_of_a_model_in_memory(opened: Callable[..., Model], monkeypatch: pytest.MonkeyPatch) -> None:
    """The next is made when the one before has freed what it held, even where it takes its time."""
    close, log = Engine.close, []

    def slow_close(engine: Engine) -> None:
        time.sleep(0.2)
        close(engine)
        log.append("closed")

    monkeypatch.setattr("herd.engine.engine.Engine.close", slow_close)
    model = opened(Opener(), idle_s=0.05)
    model.load()
    assert until(lambda: model.state == "unloaded") and not log
    model.load()
    assert log == ["closed"]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_unloading_gives_everything_back(tmp_path: Path) -> None:
    """Threads, descriptors and memory after the last time are those after the first, with the disk tier on."""
    quantize_checkpoint("tiny", tmp_path / "model", "int4")

    def found() -> tuple[int, int, int]:
        gc.collect()
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return threading.active_count(), len(list(Path("/proc/self/fd").iterdir())), resident

    pages = {"kv_gib": 0.1, "max_sequences": 1000, "step_tokens": 1000}  # 100 MB, and every one is written to
    model = herd.load(tmp_path / "model", prefix_folder=tmp_path / "kv", lazy=True, **pages)
    seen = []
    for _ in range(4):
        reply = model.generate("x" * 100, max_tokens=20, ignore_eos=True)
        assert len(reply.tokens) == 20
        for slots in model.thread.engine.pages.layers:
            slots.keys.fill_(0)
            slots.values.fill_(0)
        del slots
        assert model.stats().disk  # type: ignore[union-attr]
        full = found()[2]
        assert model.unload()
        seen.append(found())
        assert full - seen[-1][2] > 80e6
    assert {each[:2] for each in seen[1:]} == {seen[1][:2]}
    assert seen[-1][2] - seen[1][2] < 5e6


def test_two_engines_in_two_threads_answer_as_alone(tmp_path: Path) -> None:
    """Native steps of two engines, which take turns at one pool: the same tokens, drawn ones too, as each has them by itself."""
    if kernels() is None:
        pytest.skip("the native kernels are not built here")
    quantize_checkpoint("tiny", tmp_path / "one", "int4")
    quantize_checkpoint("tiny", tmp_path / "two", "int4", with_minimum=True)
    models = [herd.load(tmp_path / name, kv_gib=0.05, prefix_cache=False) for name in ("one", "two")]
    assert all(model.thread.engine.runner.whole is not None for model in models)
    prompts = [f"prompt {i} " * (1 + i % 7) for i in range(12)]

    def replies(model: Model) -> list[tuple[int, ...]]:
        asked = [model.generate(prompt, temperature=0.8, seed=i, max_tokens=60) for i, prompt in enumerate(prompts)]
        return [reply.tokens for reply in asked]

    want = [replies(model) for model in models]
    assert want[0] != want[1]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            assert list(pool.map(replies, models)) == want


def test_the_first_engine_decides_the_threads() -> None:
    native = kernels()
    if native is None:
        pytest.skip("the native kernels are not built here")
    first = herd.load("tiny", kv_gib=0.01)
    threads = native.threads
    assert first.thread.engine.threads == threads
    with pytest.raises(UsageError, match=f"threads is {threads + 1}; the engines of a process share one pool"):
        herd.load("tiny", kv_gib=0.01, threads=threads + 1)
    assert native.threads == threads


@pytest.mark.parametrize("idle_s", [-1.0, float("nan"), float("inf")])
def test_idle_s_out_of_range(idle_s: float) -> None:
    with pytest.raises(UsageError, match="idle_s is"):
        herd.load("tiny", idle_s=idle_s)


def test_a_lazy_model_is_checked_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "herd.json").write_text("{}")
    with pytest.raises(HerdError, match=r"herd\.json"):
        herd.load(tmp_path, lazy=True)


def test_a_server_of_several_models(opened: Callable[..., Model]) -> None:
    """Listed, chosen by name, loaded by the first request, streamed or not; an unknown name is a 404 with the nearest."""
    now = 0.0
    models = [opened(Opener(), name, idle_s=0.1, clock=lambda: now) for name in ("alpaca", "guanaco")]
    backend = Local(models)
    with live(backend, is_healthy=backend.is_healthy, states=backend.states) as server:
        listed = [entry["id"] for entry in server.http.get("/v1/models").json()["data"]]
        assert listed == ["alpaca", "guanaco"]
        assert "context_length" not in server.http.get("/v1/models/guanaco").json()
        assert server.http.get("/health").json() == {"status": "ok", "models": {"alpaca": "unloaded", "guanaco": "unloaded"}}
        fields = {"temperature": 0, "max_tokens": 9, "ignore_eos": True}
        lines = server.chat("hey", model="guanaco", stream=True, **fields).text.split("\n\n")
        assert lines[-2] == "data: [DONE]" and '"model":"guanaco"' in lines[0]
        assert server.http.get("/health").json()["models"] == {"alpaca": "unloaded", "guanaco": "loaded"}
        reply: httpx2.Response = server.chat("hey", model="alpaca", **fields)
        assert reply.json()["model"] == "alpaca" and reply.json()["usage"]["completion_tokens"] == 9
        error = server.chat("hey", model="guanako").json()["error"]
        assert error["code"] == "model_not_found" and error["param"] == "model" and "did you mean 'guanaco'?" in error["message"]
        now = 1.0
        assert until(lambda: set(backend.states().values()) == {"unloaded"})
        assert server.http.get("/v1/models/guanaco").json()["context_length"] == models[1].context_tokens == 1024
        assert server.chat("hey", model="alpaca", **fields).json()["choices"] == reply.json()["choices"]
