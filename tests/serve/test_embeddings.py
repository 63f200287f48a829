"""/v1/embeddings over an engine, with OpenAI's client; every field of OpenAI's is in one group."""

import asyncio
import base64
import struct
import typing

import openai
import pytest
import torch
from openai.types import embedding_create_params as openai_params

from herd.engine.local import Local, Model
from herd.serve.config import ServeConfig
from herd.serve.embeddings import EmbeddingBody
from tests.engine.greedy import packed_mean
from tests.engine.made import plain_prompt
from tests.serve.conftest import Live, live

TEXTS = ["once upon a time", "é", "x" * 300]


def test_every_openai_field_is_in_one_group() -> None:
    groups = [EmbeddingBody.honoured(), EmbeddingBody.neutral, EmbeddingBody.ignored]
    known = {name for group in groups for name in group}
    assert sum(map(len, groups)) == len(known)
    assert known == set(typing.get_type_hints(openai_params.EmbeddingCreateParams))


def test_texts_and_tokens(tiny: Model, tiny_client: openai.OpenAI) -> None:
    tokens = [[256, *text.encode()] for text in TEXTS]
    want = [packed_mean(tiny, plain_prompt(ids)) for ids in tokens]
    for given in (TEXTS, tokens):
        for form in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
            reply = tiny_client.embeddings.create(model="tiny", input=given, **form)
            assert [one.index for one in reply.data] == [0, 1, 2] and reply.object == "list" and reply.model == "tiny"
            assert reply.usage.prompt_tokens == reply.usage.total_tokens == sum(map(len, tokens))
            for one, vector in zip(reply.data, want, strict=True):
                found = one.embedding
                if isinstance(found, str):
                    found = struct.unpack(f"<{len(vector)}f", base64.b64decode(found))
                torch.testing.assert_close(torch.tensor(found), vector, atol=1e-5, rtol=0)
    for given, at in ((TEXTS[0], 0), (tokens[1], 1)):
        reply = tiny_client.embeddings.create(model="tiny", input=given, dimensions=len(want[0]), user="ann")
        torch.testing.assert_close(torch.tensor(reply.data[0].embedding), want[at], atol=1e-5, rtol=0)


def test_many_at_once_beside_replies(tiny: Model, engine: Live) -> None:
    """With OpenAI's async client."""

    async def ask() -> None:
        async with openai.AsyncOpenAI(base_url=f"{engine.url}/v1", api_key="none", max_retries=0) as client:
            texts = [chr(97 + i % 26) * (i + 1) for i in range(60)]
            chat = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=20)
            reply, _ = await asyncio.gather(client.embeddings.create(model="tiny", input=texts), chat)
            for text, one in zip(texts, reply.data, strict=True):
                want = packed_mean(tiny, plain_prompt([256, *text.encode()]))
                torch.testing.assert_close(torch.tensor(one.embedding), want, atol=1e-5, rtol=0)

    asyncio.run(ask())


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"input": ""}, "input", "holds an empty text"),
        ({"input": ["a", ""]}, "input", "holds an empty text"),
        ({"input": []}, "input", "it must be a text"),
        ({"input": [[]]}, "input", "it must be a text"),
        ({"input": [True]}, "input", "it must be a text"),
        ({"input": {"a": 1}}, "input", "it must be a text"),
        ({"input": ["a"] * 2049}, "input", "at most 2048 items"),
        ({"input": [999]}, "input", "token 999 is not in the vocabulary"),
        ({"input": [-1]}, "input", "token -1 is not in the vocabulary"),
        ({"input": ["a", "x" * 2000]}, "input", "this engine holds 1,024"),
        ({"input": [97] * 1024}, "input", "prompt has 1,024 tokens"),
        ({"dimensions": 8}, "dimensions", "dimensions is 8; vectors of this model have"),
        ({"encoding_format": "int8"}, "encoding_format", "'float' or 'base64'"),
        ({"model": "tinny"}, "model", "did you mean 'tiny'?"),
        ({"imput": "x"}, "imput", "did you mean 'input'?"),
    ],
)
def test_mistakes(engine: Live, fields: dict[str, object], param: str, message: str) -> None:
    reply = engine.http.post("/v1/embeddings", json={"model": "tiny", "input": "x", **fields})
    error = reply.json()["error"]
    assert reply.status_code == (404 if param == "model" else 400), reply.text
    assert error["param"] == param and message in error["message"]
    assert engine.http.post("/v1/embeddings", json={"model": "tiny", "input": "x"}).status_code == 200


def test_tokens_count_against_the_limit(tiny: Model) -> None:
    with live(Local([tiny]), ServeConfig(port=0, tokens_per_minute=1000, drain_s=1)) as running:
        body = {"model": "tiny", "input": [[1] * 300, [2] * 300]}
        told = running.http.post("/v1/embeddings", json=body).headers
        assert int(told["x-ratelimit-remaining-tokens"]) in range(400, 450)
        reply = running.http.post("/v1/embeddings", json=body)
        assert reply.status_code == 429 and reply.json()["error"]["code"] == "rate_limit_exceeded"


def test_a_backend_without_vectors_has_no_such_route(served: Live) -> None:
    assert served.http.post("/v1/embeddings", json={}).status_code == 404


@pytest.mark.weights
def test_what_means_the_same_lies_closer(cria: Model) -> None:
    """No more than that they mean something, on int4 weights."""
    texts = ["The cat sleeps on the sofa.", "A kitten is napping on the couch.", "Interest rates rose again in the third quarter."]
    with live(Local([cria])) as running, openai.OpenAI(base_url=f"{running.url}/v1", api_key="none") as client:
        a, b, c = (torch.tensor(one.embedding) for one in client.embeddings.create(model="cria", input=texts).data)
    assert a @ b > max(a @ c, b @ c)
