"""An engine whose step does not end: probes fail, who waits is told, and all is well again when it does end."""

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest

import herd
from herd.engine.local import Local, Model
from herd.engine.stuck import Patience
from herd.errors import HerdError
from tests.clock import until
from tests.serve.conftest import live

STUCK_S = 0.4


class Gate:
    """Stands before a runner; steps wait while it is shut."""

    whole = None

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.is_open = threading.Event()
        self.is_open.set()
        self.is_waiting = threading.Event()

    def see(self, plan: Any) -> None:
        if not self.is_open.is_set():
            self.is_waiting.set()
            assert self.is_open.wait(30)
        self.runner.see(plan)

    def __call__(self, inputs: Any) -> Any:
        return self.runner(inputs)


@pytest.fixture
def gated() -> Iterator[tuple[Model, Gate]]:
    model = herd.load("tiny")
    gate = Gate(model.thread.engine.runner)
    model.thread.engine.runner = gate  # type: ignore[assignment]
    yield model, gate
    gate.is_open.set()


def test_a_step_that_does_not_end(gated: tuple[Model, Gate]) -> None:
    model, gate = gated
    backend = Local([model], stuck_s=STUCK_S)
    with live(backend, is_healthy=backend.is_healthy) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        fields: dict[str, Any] = {"model": "tiny", "max_tokens": 400, "temperature": 0, "extra_body": {"ignore_eos": True}}
        ask = client.with_options(max_retries=0).chat.completions.create
        stream = ask(messages=[{"role": "user", "content": "hey"}], stream=True, **fields)
        next(stream)
        gate.is_open.clear()
        assert gate.is_waiting.wait(10)
        with pytest.raises(openai.APIError, match=r"the engine has not ended a step for 0\.4 s"):
            list(stream)
        for path in ("/health", "/ready"):
            reply = server.http.get(path)
            assert (reply.status_code, reply.json()["status"]) == (503, "failed")
        with pytest.raises(openai.InternalServerError) as caught:  # at once
            ask(messages=[{"role": "user", "content": "hey"}], **fields)
        assert caught.value.status_code == 503 and caught.value.response.headers["retry-after"] == "30"
        gate.is_open.set()
        assert until(backend.is_healthy)
        fields["max_tokens"] = 3
        assert ask(messages=[{"role": "user", "content": "hey"}], **fields).usage.completion_tokens == 3
        assert server.http.get("/health").status_code == server.http.get("/ready").status_code == 200
    engine = model.thread.engine
    assert engine.scheduler.is_idle and engine.scheduler.tally.aborted == 1  # what was told of had gone


def test_who_waits_in_the_queue_is_told_too(gated: tuple[Model, Gate]) -> None:
    """Handed over while the step lasts, so that the engine has not even seen it."""
    model, gate = gated
    backend = Local([model], stuck_s=STUCK_S)
    with live(backend, is_healthy=backend.is_healthy) as server:
        gate.is_open.clear()
        replies: list[int] = []

        def ask() -> None:
            replies.append(server.chat("hey", model="tiny", max_tokens=3).status_code)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert replies == [503] * 4
        gate.is_open.set()
        assert until(backend.is_healthy)
        lines = server.chat("hey", model="tiny", max_tokens=3, stream=True).text.split("\n\n")
        assert lines[-2] == "data: [DONE]" and "error" not in json.loads(lines[0][6:])


def test_an_engine_that_is_idle_or_slow_is_well(tiny: Model) -> None:
    """Neither does silence count, nor do many steps that are each short of the limit."""
    backend = Local([tiny], stuck_s=60.0)
    assert backend.is_healthy() and tiny.step_s == 0
    assert tiny.generate("x", max_tokens=20, ignore_eos=True).text is not None
    assert backend.is_healthy()


@pytest.mark.parametrize(
    ("begins", "is_stuck"), [([7.0] * 9, True), ([7.0, 7.0, 7.0, 7.0, 8.0, 8.0, None, 8.5, 8.5], False), ([None] * 9, False)]
)
def test_looks_are_counted_not_seconds(begins: list[float | None], is_stuck: bool) -> None:
    class Thread:
        @property
        def step_began(self) -> float | None:
            return begins.pop(0) if begins else None

    begins, told = list(begins), list[HerdError]()

    async def run() -> None:
        patience = Patience(Thread(), 0.04, told.append)  # type: ignore[arg-type]
        while begins and not told:
            await asyncio.sleep(0.005)
        patience.end()

    asyncio.run(asyncio.wait_for(run(), 10))
    assert bool(told) is is_stuck
