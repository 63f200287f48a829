"""Streams: their exact bytes, their silence, their failures, and clients that go away."""

import json
import logging
import socket
import time

import openai
import pytest

from herd.chat import Text
from herd.errors import ContextError, HerdError
from herd.serve.config import ServeConfig
from tests.serve.conftest import Live, client_of
from tests.serve.echo import Script, words

USAGE = {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}


def events(reply) -> list[object]:
    """The payloads of a stream."""
    lines = reply.text.split("\n\n")
    assert lines.pop() == ""
    return [line if line[6:7] != "{" else json.loads(line[6:]) for line in lines]


def test_chunks(served: Live):
    reply = served.chat("one two", stream=True)
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert reply.headers["cache-control"] == "no-cache"
    *chunks, end = events(reply)
    assert end == "data: [DONE]"
    for chunk in chunks:
        assert chunk.keys() == {"id", "object", "created", "model", "system_fingerprint", "choices"}
        assert (chunk["id"], chunk["object"], chunk["model"]) == (chunks[0]["id"], "chat.completion.chunk", "echo")
    assert [chunk["choices"] for chunk in chunks] == [
        [{"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}],
        [{"index": 0, "delta": {"content": "one"}, "logprobs": None, "finish_reason": None}],
        [{"index": 0, "delta": {"content": " two"}, "logprobs": None, "finish_reason": None}],
        [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}],
    ]


def test_usage(served: Live):
    *chunks, last, end = events(served.chat("one two", stream=True, stream_options={"include_usage": True, "include_obfuscation": False}))
    assert end == "data: [DONE]"
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks)
    assert (last["choices"], last["usage"]) == ([], {**USAGE, "prompt_tokens_details": {"cached_tokens": 0}})


def test_pings_keep_a_silent_stream_open(serve):
    served = serve(Script([0.25, *words("late")]), ServeConfig(port=0, ping_s=0.1))
    pings = [event for event in events(served.chat(stream=True)) if event == ": ping"]
    assert len(pings) == 2
    with client_of(served) as client:
        stream = client.chat.completions.create(model="echo", messages=[{"role": "user", "content": "hi"}], stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "late"


@pytest.mark.parametrize("stream", [False, True])
def test_failure_before_the_first_event_has_its_status(serve, stream: bool):
    backend = Script([ContextError("prompt has 9 tokens; this engine holds 8", "raise --context-tokens", param="messages")])
    reply = serve(backend).chat(stream=stream)
    assert reply.status_code == 400
    assert reply.json()["error"] == {
        "message": "prompt has 9 tokens; this engine holds 8. Hint: raise --context-tokens",
        "type": "invalid_request_error",
        "param": "messages",
        "code": "context_length_exceeded",
    }


def test_failure_after_a_ping_is_an_event(serve):
    reply = serve(Script([0.2, ContextError("too long")]), ServeConfig(port=0, ping_s=0.1)).chat(stream=True)
    assert (reply.status_code, events(reply)[0]) == (200, ": ping")
    assert events(reply)[-1]["error"]["code"] == "context_length_exceeded"


def test_failure_mid_stream_is_the_last_event(serve):
    served = serve(Script([Text(text="half"), HerdError("the engine has stopped", "restart herd")]))
    *chunks, last = events(served.chat(stream=True))
    assert chunks[-1]["choices"][0]["delta"] == {"content": "half"}
    assert last == {"error": {"message": "the engine has stopped. Hint: restart herd", "type": "server_error", "param": None, "code": None}}
    assert served.chat().status_code == 500
    with client_of(served) as client:
        stream = client.chat.completions.create(model="echo", messages=[{"role": "user", "content": "hi"}], stream=True)
        with pytest.raises(openai.APIError, match="the engine has stopped"):
            list(stream)


@pytest.mark.parametrize("steps", [[Text(text="half"), ZeroDivisionError("secret")], [Text(text="half")]], ids=["bug", "no Done"])
def test_bug_is_logged_and_not_told(serve, caplog, steps):
    served = serve(Script(steps))
    for stream in (False, True):
        caplog.clear()
        with caplog.at_level(logging.ERROR, "herd"):
            reply = served.chat(stream=stream)
        request_id = reply.headers["x-request-id"]
        error = events(reply)[-1]["error"] if stream else reply.json()["error"]
        assert error["type"] == "server_error" and request_id in error["message"]
        assert "secret" not in reply.text and "Traceback" not in reply.text
        [record] = caplog.records
        assert request_id in record.message and record.exc_info
        assert stream or reply.status_code == 500


def hang_up(served: Live, backend: Script, *, stream: bool, after: bytes) -> None:
    """Ask, wait until the backend is at work, read until `after` has come, and close the connection."""
    body = json.dumps({"model": "echo", "messages": [{"role": "user", "content": "hi"}], "stream": stream}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(head.encode() + body)
        assert backend.started.wait(5)
        read = b""
        while after not in read:
            piece = connection.recv(4096)
            assert piece, read
            read += piece


@pytest.mark.parametrize(
    ("steps", "stream", "after"),
    [
        ([60.0, *words("never")], False, b""),
        ([Text(text="unseen"), 60.0, *words("never")], False, b""),
        ([60.0, *words("never")], True, b""),
        ([60.0, *words("never")], True, b": ping"),
        ([Text(text="seen"), 60.0, *words("never")], True, b"seen"),
        ([Text(text="x" * 100_000), 0.0] * 100_000, True, b"xxx"),
    ],
    ids=["whole, before text", "whole, after text", "stream, before status", "stream, after ping", "stream, after text", "stream, unread"],
)
def test_client_that_goes_away_frees_its_reply(serve, caplog, steps, stream: bool, after: bytes):
    backend = Script(steps)
    with caplog.at_level(logging.WARNING):
        served = serve(backend, ServeConfig(port=0, ping_s=0.1 if b"ping" in after else 15, drain_s=1))
        hang_up(served, backend, stream=stream, after=after)
        assert backend.closed.wait(5), "the backend still works for nobody"
        deadline = time.monotonic() + 5
        while served.server.server_state.tasks and time.monotonic() < deadline:
            time.sleep(0.01)
    assert not served.server.server_state.tasks
    assert caplog.messages == []


@pytest.mark.parametrize("stream", [False, True])
def test_reply_that_ends_is_closed_too(serve, stream: bool):
    backend = Script(words("a", "b"))
    assert serve(backend).chat(stream=stream).status_code == 200
    assert backend.closed.wait(5)
