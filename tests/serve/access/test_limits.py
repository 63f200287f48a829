"""Limits per minute: buckets by a clock of the test's own, accounts by key, and OpenAI's client, which waits as it is told."""

import time
from pathlib import Path

import httpx2
import openai
import pytest

from herd.chat import Text
from herd.serve.access.keys import KeyFile
from herd.serve.access.limits import Bucket, Limits, RateLimited, duration, estimate
from herd.serve.config import ServeConfig
from herd.serve.schema import ChatBody
from tests.clock import Clock
from tests.serve.conftest import Live, bearer, client_of
from tests.serve.echo import Echo, Script, words


def chat(served: Live, text: str = "one two", key: str = "", **fields: object) -> httpx2.Response:
    body = {"model": "echo", "messages": [{"role": "user", "content": text}], **fields}
    return served.http.post("/v1/chat/completions", json=body, headers=bearer(key) if key else {})


def test_a_bucket_is_never_used_faster_than_it_fills():
    """Whatever is asked when: in any span of time no more is given than a bucket's worth and what flows in meanwhile."""
    clock = Clock(1000.0)
    bucket = Bucket(120, clock)
    given: list[tuple[float, int]] = []
    for turn in range(2000):
        clock.now += (turn * 7919 % 13) / 20
        amount = turn * 104729 % 9 + 1
        if bucket.wait_s(amount) == 0:
            bucket.take(amount)
            given.append((clock.now, amount))
    for first in range(0, len(given), 37):
        total = 0
        for now, amount in given[first:]:
            total += amount
            assert total <= 120 + (now - given[first][0]) * 2 + 1e-6
    assert sum(amount for _, amount in given) > 0.95 * (clock.now - 1000) * 2  # and no less


def test_a_bucket_waits_as_long_as_it_says():
    clock = Clock(1000.0)
    bucket = Bucket(60, clock)
    bucket.take(60)
    assert bucket.wait_s(5) == pytest.approx(5)
    clock.now += 4.99
    assert bucket.wait_s(5) > 0
    clock.now += 0.02
    assert bucket.wait_s(5) == 0
    bucket.take(35)  # a debt is paid first
    assert bucket.level == pytest.approx(-29.99) and bucket.wait_s(1) == pytest.approx(30.99)
    assert bucket.wait_s(1000) == pytest.approx(89.99)  # what is larger than the bucket needs a full one, and not for ever
    bucket.take(-1000)
    assert bucket.level == 60


def body(text: str, **fields: object) -> ChatBody:
    return ChatBody.model_validate({"model": "echo", "messages": [{"role": "user", "content": text}], **fields})


def test_an_estimate_is_settled():
    clock = Clock(1000.0)
    limits = Limits(0, 1000, clock)

    def left() -> int:
        return int(limits.meter(("a",)).headers()["x-ratelimit-remaining-tokens"])

    meter = limits.meter(("a",))
    meter.begin()
    meter.reserve(body("x" * 400, max_tokens=500))
    assert 395 <= left() <= 400
    meter.used(150)
    meter.close()
    meter.close()
    assert left() == 850
    refused = limits.meter(("a",))
    with pytest.raises(RateLimited, match="1,000 tokens per minute are used up") as caught:
        refused.reserve(body("", max_tokens=900))
    assert caught.value.retry_after_s == pytest.approx(60 * 50 / 1000, rel=0.1) and caught.value.kind == "tokens"
    refused.close()
    assert left() == 850
    failed = limits.meter(("a",))
    failed.reserve(body("x" * 400))
    failed.close()  # it was never answered
    assert left() == 850
    broken = limits.meter(("a",))
    broken.reserve(body("x" * 400))
    broken.used(40, is_end=False)
    broken.close()
    assert 705 <= left() <= 710
    assert limits.meter(("b",)).headers()["x-ratelimit-remaining-tokens"] == "1000"
    assert Limits(0, 0, clock).meter(("a",)) is None and Limits(0, 9, clock).meter(("a",), 0, 0) is None


def test_estimates():
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 1_000_000}}
    assert estimate(body("x" * 4000))[0] == pytest.approx(1000, abs=10)
    assert estimate(body([image]))[0] == pytest.approx(1000, abs=10)
    assert estimate(body("", max_tokens=7, n=3))[1] == 21
    assert [duration(s) for s in (0, 0.0201, 1.5, 59.99, 60, 360)] == ["0ms", "21ms", "1.5s", "1m0s", "1m0s", "6m0s"]


def test_each_key_has_its_own(serve, tmp_path: Path):
    file = KeyFile(tmp_path / "keys.json")
    ann, bob, eve = file.make("ann"), file.make("bob", requests_per_minute=5), file.make("eve", requests_per_minute=0)
    served = serve(Echo(), ServeConfig(port=0, keys_file=file.path, requests_per_minute=2, drain_s=1))
    assert [chat(served, key=ann).status_code for _ in range(3)] == [200, 200, 429]
    assert [chat(served, key=bob).status_code for _ in range(6)] == [200] * 5 + [429]
    assert {chat(served, key=eve).status_code for _ in range(20)} == {200}
    refused = chat(served, key=ann)
    error = refused.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("requests", "rate_limit_exceeded", None)
    assert 1 <= int(refused.headers["retry-after"]) <= 30 and 0 < int(refused.headers["retry-after-ms"]) <= 30_000
    assert refused.headers["x-should-retry"] == "true"
    assert [refused.headers[f"x-ratelimit-{what}-requests"] for what in ("limit", "remaining")] == ["2", "0"]
    assert served.http.get("/v1/models", headers=bearer(ann)).status_code == 200  # looking is free
    told = served.http.post("/v1/messages", json={}, headers=bearer(ann)).json()
    assert (told["type"], told["error"]["type"]) == ("error", "rate_limit_error")


def test_tokens_are_counted_as_they_were_used(serve):
    """Streamed or not; one account for all where no keys are asked for."""
    served = serve(Echo(), ServeConfig(port=0, tokens_per_minute=1000, drain_s=1))
    reply = chat(served, "one two three", max_tokens=500)
    assert reply.headers["x-ratelimit-limit-tokens"] == "1000" and "x-ratelimit-limit-requests" not in reply.headers
    assert int(reply.headers["x-ratelimit-remaining-tokens"]) in (994, 995)  # three and three
    streamed = chat(served, "one two three", max_tokens=500, stream=True)
    assert int(streamed.headers["x-ratelimit-remaining-tokens"]) in range(485, 500)  # not known yet
    assert int(chat(served, "x").headers["x-ratelimit-remaining-tokens"]) in range(985, 992)
    assert chat(served, "x " * 400).status_code == 200
    assert chat(served, "x " * 400).status_code == 429


def test_a_reader_who_leaves_pays_for_what_he_got(serve):
    served = serve(Script([*[Text(text="word ")] * 50, 60.0]), ServeConfig(port=0, tokens_per_minute=1000, drain_s=1))
    body = {"model": "echo", "messages": [{"role": "user", "content": "x"}], "stream": True}
    with served.http.stream("POST", "/v1/chat/completions", json=body) as reply:
        lines = reply.iter_lines()
        for _ in range(60):
            next(lines)
    for _ in range(100):
        left = int(
            served.http.post("/v1/chat/completions", content="", headers={"content-type": "x"}).headers["x-ratelimit-remaining-tokens"]
        )
        if 930 < left < 960:
            return
        time.sleep(0.05)
    pytest.fail(f"{left} are left")


def test_openais_client_waits_as_it_is_told(serve):
    served = serve(Echo(), ServeConfig(port=0, requests_per_minute=100, drain_s=1))
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=5) as client:
        ask = client.chat.completions.with_raw_response.create
        asked = (ask(model="echo", messages=[{"role": "user", "content": "x"}]).retries_taken for _ in range(1000))
        assert next(retries for retries in asked if retries) <= 2  # told to the millisecond, so that one more try is enough
    with (
        client_of(served) as client,
        pytest.raises(openai.RateLimitError) as caught,
    ):
        for _ in range(1000):
            client.chat.completions.create(model="echo", messages=[{"role": "user", "content": "x"}])
    assert caught.value.code == "rate_limit_exceeded"


def test_words_have_no_limit_by_themselves(serve):
    served = serve(Script(words("a")))
    assert not [name for name in served.chat().headers if "ratelimit" in name]
