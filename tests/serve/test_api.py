"""OpenAI's own client against a real server: what it sends is understood, what comes back it understands."""

import asyncio
import json

import openai
import pytest

from herd.chat import Image
from tests.serve.conftest import Live, client_of
from tests.serve.echo import Echo, Script, words
from tests.serve.samples import IMAGE, PIXEL

HELLO = [{"role": "user", "content": "one two three"}]


@pytest.fixture
def client(served: Live):
    with client_of(served) as client:
        yield client


def test_whole_reply(client):
    reply = client.chat.completions.create(model="echo", messages=HELLO)
    assert reply.id.startswith("chatcmpl-") and reply.object == "chat.completion" and reply.model == "echo"
    [choice] = reply.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "stop", None)
    assert (choice.message.role, choice.message.content, choice.message.refusal) == ("assistant", "one two three", None)
    usage = {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    assert reply.usage.model_dump(exclude_none=True) == {**usage, "prompt_tokens_details": {"cached_tokens": 0}}


def test_streamed_reply_is_the_same(client):
    with client.chat.completions.create(model="echo", messages=HELLO, stream=True) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "one two three"
    assert {chunk.id for chunk in chunks} == {chunks[0].id} and chunks[0].id.startswith("chatcmpl-")
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 4 + ["stop"]


def test_stream_helper_of_the_client(client):
    with client.chat.completions.stream(model="echo", messages=HELLO, stream_options={"include_usage": True}) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "one two three" and final.usage.total_tokens == 6


def test_async_client_and_sixteen_at_once(served: Live):
    async def ask(client: openai.AsyncOpenAI, i: int) -> str:
        text = " ".join(f"{i}-{word}" for word in range(20))
        if i % 2:
            reply = await client.chat.completions.create(model="echo", messages=[{"role": "user", "content": text}])
            return reply.choices[0].message.content == text
        stream = await client.chat.completions.create(model="echo", messages=[{"role": "user", "content": text}], stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == text

    async def ask_all() -> list[bool]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, i) for i in range(16)))

    assert asyncio.run(ask_all()) == [True] * 16


def test_a_reply_can_be_sent_back(client, echo: Echo):
    """Clients append the message that they got, with whatever fields it had."""
    first = client.chat.completions.create(model="echo", messages=HELLO).choices[0].message
    for message in (first, first.model_dump()):
        client.chat.completions.create(model="echo", messages=[*HELLO, message, {"role": "user", "content": "more"}])
        assert [m.text for m in echo.requests[-1].messages] == ["one two three", "one two three", "more"]


def test_messages(client, echo: Echo):
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "name": "Ann", "content": [{"type": "text", "text": "before "}, IMAGE, {"type": "text", "text": " after"}]},
        {"role": "assistant", "content": [{"type": "text", "text": ""}]},
        {"role": "system", "content": ""},
        {"role": "user", "content": "héllo 😀"},
    ]
    reply = client.chat.completions.create(model="echo", messages=messages)
    assert reply.choices[0].message.content == "héllo 😀"
    assert [(m.role, m.content) for m in echo.requests[-1].messages] == [
        ("system", ("Be brief.",)),
        ("user", ("before ", Image(data=PIXEL), " after")),
        ("assistant", ("",)),
        ("system", ("",)),
        ("user", ("héllo 😀",)),
    ]


def test_models(client):
    listed = client.models.list().data
    assert [(m.id, m.object, m.owned_by) for m in listed] == [("echo", "model", "herd"), ("second-model", "model", "herd")]
    assert client.models.retrieve("second-model") == listed[1] and listed[1].created > 1_700_000_000
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("org/second")
    assert caught.value.code == "model_not_found"


def test_unknown_model(client):
    for stream in (False, True):
        with pytest.raises(openai.NotFoundError, match=r"no model is called 'ecko' here\. Hint: did you mean 'echo'\?") as caught:
            client.chat.completions.create(model="ecko", messages=HELLO, stream=stream)
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_length(client):
    reply = client.chat.completions.create(model="echo", messages=HELLO, max_completion_tokens=2)
    assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == ("one two", "length")


def test_reply_without_text(serve):
    served = serve(Script(words()))
    assert served.chat().json()["choices"][0]["message"]["content"] == ""
    deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in served.chat(stream=True).text.split("\n\n")[:-2]]
    assert deltas == [{"role": "assistant", "content": ""}, {}]
