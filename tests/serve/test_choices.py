"""Several replies to one request, log-probabilities, timings: against an engine of random weights, and to the letter."""

import asyncio
import json
import math
from collections.abc import Iterator

import openai
import pytest

from herd.chat import Done, Drawn, Progress, Sampling, Text, TopToken, Usage
from herd.engine.local import Local, Model
from herd.errors import HerdError
from herd.serve.choices import side_by_side
from herd.serve.request import nth
from tests.serve.conftest import client_of, live
from tests.serve.echo import Script, words

LONG = "a prompt over several pages of the cache, so that its replies have something to share, and a few words more"
HELLO = [{"role": "user", "content": LONG}]


@pytest.fixture(scope="module")
def client(tiny: Model) -> Iterator[openai.OpenAI]:
    with live(Local([tiny])) as server, client_of(server) as client:
        yield client


def test_each_of_n_is_the_reply_to_its_seed(client: openai.OpenAI):
    asked = {"model": "tiny", "messages": HELLO, "max_tokens": 12, "temperature": 1}
    alone = [client.chat.completions.create(**asked, seed=7 + i).choices[0].message.content for i in range(3)]
    whole = client.chat.completions.create(**asked, seed=7, n=3)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert [choice.message.content for choice in whole.choices] == alone and len(set(alone)) == 3
    streamed = ["", "", ""]
    reasons = {}
    for chunk in client.chat.completions.create(**asked, seed=7, n=3, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert streamed == alone and reasons == {i: choice.finish_reason for i, choice in enumerate(whole.choices)}
    assert chunk.usage.completion_tokens == whole.usage.completion_tokens <= 36
    assert chunk.usage.prompt_tokens == whole.usage.prompt_tokens < len(LONG) + 40  # once, not three times


def test_the_prompt_is_computed_once(tiny: Model, client: openai.OpenAI):
    before = tiny.stats()
    client.chat.completions.create(model="tiny", messages=HELLO, n=4, max_tokens=1, extra_body={"prompt_cache_key": "fresh"})
    after = tiny.stats()
    prompt = (after.prompt_tokens - before.prompt_tokens) // 4
    assert after.computed_tokens - before.computed_tokens < 2 * prompt


def test_seeds_stay_in_range():
    last = (1 << 63) - 1
    assert nth(Sampling(seed=last), 0).seed == last
    assert nth(Sampling(seed=last), 2).seed == -(1 << 63) + 1
    assert nth(Sampling(), 2).seed is None


def test_one_failure_ends_all():
    backends = [Script([*words("a"), 60.0]), Script([0.05, HerdError("broken")]), Script([60.0])]

    async def read() -> None:
        async for _ in side_by_side([backend.chat(None) for backend in backends]):
            pass

    with pytest.raises(HerdError, match="broken"):
        asyncio.run(asyncio.wait_for(read(), 5))
    assert all(backend.closed.is_set() for backend in backends)


def test_closing_closes_all():
    backends = [Script([Text(text="a"), 60.0]), Script([60.0])]

    async def leave() -> None:
        replies = side_by_side([backend.chat(None) for backend in backends])
        assert (await anext(replies))[1] == Text(text="a")
        await replies.aclose()

    asyncio.run(asyncio.wait_for(leave(), 5))
    assert all(backend.closed.is_set() for backend in backends)


def test_logprobs(tiny: Model, client: openai.OpenAI):
    asked = {"model": "tiny", "messages": HELLO, "max_tokens": 10, "temperature": 0, "logprobs": True, "top_logprobs": 3}
    whole = client.chat.completions.create(**asked).choices[0]
    expected = tiny.chat(HELLO, max_tokens=10, temperature=0, logprobs=3).whole
    told = whole.logprobs.content
    assert [bytes(token.bytes) for token in told] == [drawn.data for drawn in expected.drawn]
    for token, drawn in zip(told, expected.drawn, strict=True):
        assert token.logprob == pytest.approx(drawn.logprob, abs=1e-4)
        assert [bytes(top.bytes) for top in token.top_logprobs] == [top.data for top in drawn.top]
        assert token.token == drawn.data.decode("utf-8", errors="replace")
    chunks = list(client.chat.completions.create(**asked, stream=True))
    streamed = [token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    assert streamed == told
    plain = client.chat.completions.create(**{**asked, "logprobs": False, "top_logprobs": 0})
    assert plain.choices[0].logprobs is None and plain.choices[0].message.content == whole.message.content


def test_logprobs_of_what_cannot_be(serve):
    drawn = Drawn(token=5, data=b"\xc3", logprob=-math.inf, top=(TopToken(token=6, data=b"a", logprob=-0.5),))
    steps = [drawn, Text(text="a"), Done(reason="stop", usage=Usage(prompt_tokens=1, completion_tokens=1))]
    reply = serve(Script(steps)).chat()
    assert reply.json()["choices"][0]["logprobs"] == {
        "content": [{"token": "�", "logprob": -9999.0, "bytes": [195], "top_logprobs": [{"token": "a", "logprob": -0.5, "bytes": [97]}]}],
        "refusal": None,
    }


def test_logit_bias_and_penalties_reach_the_engine(tiny: Model, client: openai.OpenAI):
    asked = {"model": "tiny", "messages": HELLO, "max_tokens": 6, "temperature": 0}
    reply = client.chat.completions.create(**asked, logit_bias={str(ord("z")): 100})
    assert reply.choices[0].message.content == "zzzzzz"
    fields = {"logit_bias": {ord("z"): 100.0, ord("y"): 99.0}, "frequency_penalty": 2.0}
    expected = tiny.chat(HELLO, max_tokens=6, temperature=0, **fields).text
    wire = {"logit_bias": {str(ord("z")): 100, str(ord("y")): 99}, "frequency_penalty": 2}
    assert client.chat.completions.create(**asked, **wire).choices[0].message.content == expected == "zyzyzy"


def test_stop_is_cut(client: openai.OpenAI):
    asked = {"model": "tiny", "messages": HELLO, "max_tokens": 6, "temperature": 0, "logit_bias": {str(ord("z")): 100}}
    choice = client.chat.completions.create(**asked, stop=["zzz"]).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("", "stop")


def test_progress_of_a_prompt(serve, client: openai.OpenAI):
    """From an engine whose steps are shorter than the prompt: every piece but the last is told, with what was taken over."""
    events = [Progress(prompt_tokens=100, read_tokens=40, cached_tokens=16), 0.05, *words("a", "b")]
    served = serve(Script(events))
    lines = [json.loads(line[6:]) for line in served.chat(stream=True, return_progress=True, timings=True).text.split("\n\n")[:-2]]
    [told] = [line["prompt_progress"] for line in lines if "prompt_progress" in line]
    assert (told["total"], told["cache"], told["processed"]) == (100, 16, 40) and told["time_ms"] >= 0
    assert [line["choices"][0]["delta"] for line in lines[:3]] == [{"role": "assistant", "content": ""}, {}, {"content": "a"}]
    assert lines[-1]["timings"]["prompt_ms"] >= 50, "a prompt that is being read is no reply yet"
    assert served.chat(return_progress=True).json()["error"]["param"] == "return_progress"
    with client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=1, stream=True) as stream:
        assert not any("prompt_progress" in (chunk.model_extra or {}) for chunk in stream)


@pytest.mark.parametrize("stream_options", [None, {"include_usage": True}])
def test_timings(serve, stream_options):
    served = serve(
        Script([0.05, Text(text="a"), 0.1, Done(reason="stop", usage=Usage(prompt_tokens=9, completion_tokens=2, cached_tokens=4))])
    )
    whole = served.chat(timings=True).json()["timings"]
    assert (whole["cache_n"], whole["prompt_n"], whole["predicted_n"]) == (4, 5, 2)
    assert whole["prompt_ms"] >= 50 and whole["predicted_ms"] >= 100
    assert whole["predicted_per_second"] == pytest.approx(2 / whole["predicted_ms"] * 1e3, rel=1e-3)
    assert "timings" not in served.chat().json()
    lines = served.chat(stream=True, timings=True, stream_options=stream_options).text.split("\n\n")[:-2]
    with_timings = ["timings" in json.loads(line[6:]) for line in lines]
    assert with_timings == [False] * (len(lines) - 1) + [True]
