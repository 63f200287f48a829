"""/v1/batches with OpenAI's client: every request is answered once, as over HTTP, whatever happens to the server meanwhile."""

import asyncio
import json
import os
import signal
import sqlite3
import time
import typing
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import Batch, batch_create_params, batch_list_params

from herd.chat import ChatEvent, ChatRequest
from herd.engine.local import Local, Model
from herd.errors import HerdError, ResourceError
from herd.serve.access.keys import KeyFile
from herd.serve.batches import jobs as module
from herd.serve.batches.files import Page
from herd.serve.batches.jobs import BatchBody
from herd.serve.config import ServeConfig
from tests.processes import Forks
from tests.serve.conftest import Live, client_of, live
from tests.serve.echo import Echo

CHAT = "/v1/chat/completions"
Serve = Callable[..., Live]


def config_of(folder: Path, **more: Any) -> ServeConfig:
    return ServeConfig(port=0, data_folder=folder, drain_s=1, **more)


@pytest.fixture
def client(serve: Serve, tmp_path: Path) -> Iterator[openai.OpenAI]:
    with client_of(serve(Echo(), config_of(tmp_path))) as client:
        yield client


def ask(content: str, **more: object) -> dict[str, object]:
    return {"model": "echo", "messages": [{"role": "user", "content": content}], **more}


def jsonl(bodies: dict[str, dict[str, object]], url: str = CHAT) -> bytes:
    lines = ({"custom_id": name, "method": "POST", "url": url, "body": body} for name, body in bodies.items())
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def submit(client: openai.OpenAI, data: bytes, endpoint: Any = CHAT, **more: Any) -> Batch:
    file = client.files.create(file=("requests.jsonl", data), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **more)


def wait(client: openai.OpenAI, batch: Batch, seconds: float = 20) -> Batch:
    for _ in range(int(seconds / 0.02)):
        batch = client.batches.retrieve(batch.id)
        if batch.status in ("completed", "failed", "expired", "cancelled"):
            return batch
        time.sleep(0.02)
    raise AssertionError(f"still {batch.status}, {batch.request_counts}")


def results(client: openai.OpenAI, file_id: str | None) -> dict[str, Any]:
    """By custom_id, each of which must be there once."""
    entries = [json.loads(line) for line in client.files.content(file_id).content.splitlines()] if file_id else []
    found = {entry["custom_id"]: entry for entry in entries}
    assert len(found) == len(entries) == len({entry["id"] for entry in entries})
    return found


def test_every_openai_field_is_known() -> None:
    assert set(typing.get_type_hints(batch_create_params.BatchCreateParams)) == {*BatchBody.honoured(), *BatchBody.neutral}
    assert set(typing.get_type_hints(batch_list_params.BatchListParams)) == set(Page.honoured())


def test_lines_are_answered_as_over_http(serve: Serve, tmp_path: Path) -> None:
    running = serve(Echo(), config_of(tmp_path))
    bodies = {f"good {i}": ask(f"line {i} ü\n", max_tokens=2) for i in range(20)}
    bad = {
        "stream": ask("hi", stream=True),
        "field": ask("hi", temprature=1),
        "model": ask("hi", model="ecko"),
        "nothing": {},
        "value": ask("hi", temperature=3),
        "url": ask([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]),  # type: ignore[arg-type]
    }
    with client_of(running) as client:
        batch = submit(client, jsonl(bodies | bad), metadata={"a": "b"})
        assert (batch.object, batch.endpoint, batch.status, batch.metadata) == ("batch", CHAT, "validating", {"a": "b"})
        assert batch.expires_at == batch.created_at + 24 * 3600 and batch.id.startswith("batch_")
        batch = wait(client, batch)
        assert batch.status == "completed" and batch.request_counts.to_dict() == {"total": 26, "completed": 20, "failed": 6}
        assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
        good, wrong = results(client, batch.output_file_id), results(client, batch.error_file_id)
        assert good.keys() == bodies.keys() and wrong.keys() == bad.keys()
        output = client.files.retrieve(batch.output_file_id)
        assert (output.purpose, output.filename) == ("batch_output", f"{batch.id}_output.jsonl")
        assert [file.id for file in client.files.list(purpose="batch_output")] == [batch.error_file_id, batch.output_file_id]
        with pytest.raises(openai.BadRequestError, match="upload it with 'batch'"):
            client.batches.create(input_file_id=output.id, endpoint=CHAT, completion_window="24h")
    tokens = 0
    for name, entry in (good | wrong).items():
        assert entry["error"] is None and entry["response"]["request_id"]
        over_http = running.http.post(CHAT, json=(bodies | bad)[name])
        body = entry["response"]["body"]
        if name == "stream":
            assert entry["response"]["status_code"] == 400 and body["error"]["param"] == "stream"
            continue
        assert entry["response"]["status_code"] == over_http.status_code
        for key in ("id", "created"):
            assert name in bad or body.pop(key)
        tokens += body.get("usage", {}).get("total_tokens", 0)
        assert body == {key: value for key, value in over_http.json().items() if key not in ("id", "created")}
    assert batch.usage.total_tokens == tokens > 0


def test_a_file_with_mistakes_fails_as_a_whole(serve: Serve, tmp_path: Path) -> None:
    echo = Echo()
    with client_of(serve(echo, config_of(tmp_path, max_batch_lines=3, max_body_bytes=5000))) as client:
        smuggled = jsonl({"x": {}}, "/v1/files") + jsonl({"y": ask("hi")}) + jsonl({"y": ask("hi")}) + b"no JSON\n"
        batch = wait(client, submit(client, smuggled))
        assert (batch.status, batch.output_file_id, batch.error_file_id) == ("failed", None, None) and batch.failed_at
        told = [(error.line, error.code) for error in batch.errors.data]
        assert told == [(1, "invalid_url"), (3, "duplicate_custom_id"), (4, "too_many_lines")]
        for data, code in ((b"", "empty_file"), (jsonl({"a": ask("x" * 6000)}), "line_too_long"), (b"\xff\xfe", "invalid_json_line")):
            batch = wait(client, submit(client, data))
            assert batch.status == "failed" and batch.errors.data[0].code == code
        assert not echo.requests and not list(client.files.list(purpose="batch_output"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"completion_window": "1h"}, "completion_window is"),
        ({"endpoint": "/v1/moderations"}, "which no batch may ask. Hint: there are: /v1/chat/completions"),
        ({"endpoint": "/v1/files"}, "which no batch may ask"),
        ({"input_file_id": 5}, "input_file_id is 5"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 3600}}, "output_expires_after is"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata is"),
        ({"metadata": {"a": "x" * 513}}, "metadata.a is"),
        ({"metadata": {"a": 1}}, "metadata.a is 1"),
        ({"priority": 1}, "priority is an unknown field"),
    ],
)
def test_mistakes(serve: Serve, tmp_path: Path, fields: dict[str, object], message: str) -> None:
    running = serve(Echo(), config_of(tmp_path))
    with client_of(running) as client:
        file = client.files.create(file=("a", b"x"), purpose="batch")
    body = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h", **fields}
    reply = running.http.post("/v1/batches", json=body)
    assert reply.status_code == 400 and message in reply.json()["error"]["message"]
    assert running.http.post("/v1/batches", content=json.dumps(body), headers={"content-type": "text/plain"}).status_code == 415


def test_a_batch_that_is_cancelled_tells_of_every_line(serve: Serve, tmp_path: Path) -> None:
    with client_of(serve(Echo(word_s=0.02), config_of(tmp_path, batch_width=2))) as client:
        batch = submit(client, jsonl({str(i): ask("a b c") for i in range(100)}))
        while client.batches.retrieve(batch.id).request_counts.completed < 3:
            time.sleep(0.02)
        with pytest.raises(openai.BadRequestError, match=f"is read by {batch.id}"):
            client.files.delete(batch.input_file_id)
        assert client.batches.cancel(batch.id).status == "cancelling"
        batch = wait(client, batch)
        assert batch.status == "cancelled" and batch.cancelled_at >= batch.cancelling_at
        good, left = results(client, batch.output_file_id), results(client, batch.error_file_id)
        assert {*good, *left} == {str(i) for i in range(100)} and len(good) + len(left) == 100 and 3 <= len(good) < 90
        assert all(entry["response"] is None and entry["error"]["code"] == "batch_cancelled" for entry in left.values())
        with pytest.raises(openai.BadRequestError, match="is cancelled"):
            client.batches.cancel(batch.id)
        assert client.files.delete(batch.input_file_id).deleted


def test_a_batch_whose_time_is_over(tmp_path: Path) -> None:
    """Also while no server was there."""
    with live(Echo(word_s=0.05), config_of(tmp_path)) as running, client_of(running) as client:
        batch = submit(client, jsonl({str(i): ask("a b c d e f g h i") for i in range(50)}))
        while client.batches.retrieve(batch.id).status != "in_progress":
            time.sleep(0.02)
    with sqlite3.connect(tmp_path / "server.sqlite") as db:
        ((told,),) = db.execute("SELECT told FROM batches")
        db.execute("UPDATE batches SET told = ?", (json.dumps(json.loads(told) | {"expires_at": time.time() + 1.5}),))
    db.close()
    with live(Echo(word_s=0.05), config_of(tmp_path)) as running, client_of(running) as client:
        batch = wait(client, batch)
        assert batch.status == "expired" and batch.expired_at
        good, left = results(client, batch.output_file_id), results(client, batch.error_file_id)
        assert len(good) + len(left) == 50 and good and {entry["error"]["code"] for entry in left.values()} == {"batch_expired"}


def test_batches_belong_to_their_caller(serve: Serve, tmp_path: Path) -> None:
    """And what they ask is asked by him, in the background."""
    keys, echo = KeyFile(tmp_path / "keys.json"), Echo()
    secrets = [keys.make(name) for name in ("ann", "bob")]
    running = serve(echo, config_of(tmp_path / "data", keys_file=keys.path))
    ann, bob = (client_of(running, secret) for secret in secrets)
    with ann, bob:
        batches = [submit(client, jsonl({name: ask(name)})) for client, name in ((ann, "of ann"), (bob, "of bob"))]
        for client, batch in zip((ann, bob), batches, strict=True):
            assert wait(client, batch).status == "completed" and [one.id for one in client.batches.list()] == [batch.id]
        for call in (bob.batches.retrieve, bob.batches.cancel):
            with pytest.raises(openai.NotFoundError, match="there is no batch"):
                call(batches[0].id)
        with pytest.raises(openai.NotFoundError):
            bob.files.content(ann.batches.retrieve(batches[0].id).output_file_id)
        ann.chat.completions.create(**ask("in front"))  # type: ignore[call-overload]
    salts = {request.messages[0].text: (request.cache_salt, request.background) for request in echo.requests}
    assert salts["of ann"] == (salts["in front"][0], True) and salts["in front"][1] is False and salts["of bob"][0] != salts["of ann"][0]


def test_lists_go_page_by_page(client: openai.OpenAI) -> None:
    ids = [submit(client, jsonl({"a": ask("hi")})).id for _ in range(5)]
    page = client.batches.list(limit=2)
    assert [batch.id for batch in page.data] == ids[:2:-1] and page.has_more
    assert [batch.id for batch in page] == ids[::-1]


class Crowd(Echo):
    """Knows how many are answered at once, and in which order they came."""

    def __init__(self) -> None:
        super().__init__(word_s=0.01)
        self.now = self.most = 0

    async def chat(self, request: ChatRequest) -> AsyncIterator[ChatEvent]:
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            async for event in super().chat(request):
                yield event
        finally:
            self.now -= 1


def test_several_lines_at_once_and_batches_in_turn(serve: Serve, tmp_path: Path) -> None:
    crowd = Crowd()
    with client_of(serve(crowd, config_of(tmp_path, batch_width=3))) as client:
        batches = [submit(client, jsonl({f"{name}{i}": ask(f"{name} x") for i in range(30)})) for name in ("first", "second")]
        for batch in batches:
            assert wait(client, batch).request_counts.completed == 30
    assert crowd.most == 3
    names = [request.messages[0].text.split()[0] for request in crowd.requests]
    second = names.index("second")
    assert second < 28 and abs(Counter(names[second : second + 20])["second"] - 10) <= 2


class Failing(Echo):
    """Fails so many times."""

    def __init__(self, error: HerdError, times: int) -> None:
        super().__init__()
        self.error, self.times = error, times

    async def chat(self, request: ChatRequest) -> AsyncIterator[ChatEvent]:
        self.times -= 1
        if self.times >= 0:
            raise self.error
        async for event in super().chat(request):
            yield event


def test_a_server_without_room_is_asked_again(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSES_S", (0.01, 0.01))
    data = jsonl({"a": ask("hi")})
    for error, times, failed in ((ResourceError("no room"), 2, 0), (ResourceError("no room"), 3, 1), (HerdError("broken"), 1, 1)):
        with client_of(serve(Failing(error, times), config_of(tmp_path / f"{error}{times}"))) as client:
            assert wait(client, submit(client, data)).request_counts.failed == failed


def test_an_engine_that_died_spoils_no_line(serve: Serve, tmp_path: Path) -> None:
    """They wait for the server to be started anew."""
    healthy = False
    failing = Failing(HerdError("the engine has stopped"), 1)
    with client_of(serve(failing, config_of(tmp_path), is_healthy=lambda: healthy)) as client:
        batch = submit(client, jsonl({"a": ask("hi")}))
        time.sleep(0.3)
        assert client.batches.retrieve(batch.id).request_counts.to_dict() == {"total": 1, "completed": 0, "failed": 0}
        healthy = True
        assert wait(client, batch).request_counts.completed == 1


def test_a_disk_that_was_full_for_a_while(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AGAIN_S", 0.05)
    fdatasync, times = os.fdatasync, iter(range(3))

    def full(descriptor: int) -> None:
        if next(times, None) is not None:
            raise OSError(28, "No space left on device")
        fdatasync(descriptor)

    monkeypatch.setattr(os, "fdatasync", full)
    with client_of(serve(Echo(), config_of(tmp_path))) as client:
        batch = wait(client, submit(client, jsonl({str(i): ask("hi") for i in range(40)})))
        assert batch.request_counts.completed == 40 and len(results(client, batch.output_file_id)) == 40


@pytest.mark.slow
def test_kill_9_loses_no_line_and_tells_none_twice(forks: Forks, tmp_path: Path) -> None:
    """At random moments, from validating to the end; and once in good order."""
    expected = {f"line {i}": ask(f"text {i} a b", temprature=1) if i % 10 == 9 else ask(f"text {i} a b") for i in range(600)}
    batch = None
    for attempt in range(6):
        with (
            forks.run("tests.serve.echo:serve_echo", 0.01, str(tmp_path)) as server,
            client_of(server) as client,
        ):
            batch = batch or submit(client, jsonl(expected))
            if attempt < 5:
                time.sleep(0.1 + 0.15 * attempt)
                before = client.batches.retrieve(batch.id)
                server.send_signal(signal.SIGTERM if attempt == 2 else signal.SIGKILL)
                server.wait(10)
                continue
            assert before.status == "in_progress" and 0 < before.request_counts.completed < 540, before
            batch = wait(client, batch, 60)
            good, wrong = results(client, batch.output_file_id), results(client, batch.error_file_id)
    assert batch.status == "completed" and batch.request_counts.to_dict() == {"total": 600, "completed": 540, "failed": 60}
    assert {*good, *wrong} == expected.keys() and len(good) + len(wrong) == 600
    for name, entry in good.items():
        assert entry["response"]["body"]["choices"][0]["message"]["content"] == f"text {name[5:]} a b"
    assert all(entry["response"]["status_code"] == 400 for entry in wrong.values())


def test_all_endpoints_over_an_engine(tiny: Model, serve: Serve, tmp_path: Path) -> None:
    """With OpenAI's async client, beside a chat that somebody waits for."""
    running = serve(Local([tiny]), config_of(tmp_path))
    greedy = {"model": "tiny", "temperature": 0, "max_tokens": 12}
    asked = {
        CHAT: {f"c{i}": {**greedy, "messages": [{"role": "user", "content": f"hi {i}"}]} for i in range(12)},
        "/v1/completions": {f"t{i}": {**greedy, "prompt": f"once {i}"} for i in range(12)},
        "/v1/embeddings": {f"e{i}": {"model": "tiny", "input": [f"text {i}", "other"]} for i in range(12)},
    }

    async def one(client: openai.AsyncOpenAI, endpoint: Any, bodies: dict[str, Any]) -> None:
        file = await client.files.create(file=("a.jsonl", jsonl(bodies, endpoint)), purpose="batch")
        batch = await client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h")
        while batch.status != "completed":
            assert batch.status in ("validating", "in_progress", "finalizing"), batch
            await asyncio.sleep(0.05)
            batch = await client.batches.retrieve(batch.id)
        entries = [json.loads(line) for line in (await client.files.content(batch.output_file_id)).content.splitlines()]
        assert sorted(entry["custom_id"] for entry in entries) == sorted(bodies)
        for entry in entries:
            body, alone = entry["response"]["body"], running.http.post(endpoint, json=bodies[entry["custom_id"]]).json()
            if endpoint == "/v1/embeddings":
                for a, b in zip(body["data"], alone["data"], strict=True):
                    assert a["embedding"] == pytest.approx(b["embedding"], abs=1e-5)
            else:
                assert body["choices"] == alone["choices"]
        assert batch.usage.total_tokens == sum(entry["response"]["body"]["usage"]["total_tokens"] for entry in entries)

    async def everything() -> None:
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=30) as client:
            chat = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "me"}], max_tokens=50)
            await asyncio.gather(chat, *(one(client, endpoint, bodies) for endpoint, bodies in asked.items()))

    asyncio.run(everything())
