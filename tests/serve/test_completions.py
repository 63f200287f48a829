"""/v1/completions, /tokenize and /detokenize over an engine, against Python's API; every field of OpenAI's is in one group."""

import json
import typing

import openai
import pytest
from openai.types import completion_create_params as openai_params

from herd.chat import Drawn, Message
from herd.engine.local import Model
from herd.serve.completions import CompletionBody, Table, _name
from tests.serve.conftest import Live
from tests.serve.samples import EXTENSIONS, OF_RIVALS

ASKED = {"model": "tiny", "temperature": 0, "max_tokens": 8}


def test_every_openai_field_is_in_one_group():
    groups = [CompletionBody.honoured(), CompletionBody.neutral, CompletionBody.ignored]
    known = {name for group in groups for name in group}
    assert sum(map(len, groups)) == len(known)
    fields = set(typing.get_type_hints(openai_params.CompletionCreateParamsStreaming))
    more = EXTENSIONS | OF_RIVALS.keys() | {"prompt_cache_key"}
    assert known == (fields | more) - {"return_progress"}  # which chat completions alone have


def test_texts_and_tokens(tiny: Model, tiny_client: openai.OpenAI):
    first, second = (tiny.generate(text, temperature=0, max_tokens=8) for text in ("once upon", "a time"))
    tokens = [256, *tiny.tokenizer.encode("once upon")]
    for prompt in ("once upon", tokens, [tokens], ["once upon"]):
        reply = tiny_client.completions.create(**ASKED, prompt=prompt)
        assert [choice.text for choice in reply.choices] == [first.text]
    reply = tiny_client.completions.create(**ASKED, prompt=["once upon", "a time"])
    assert reply.object == "text_completion" and reply.id.startswith("cmpl-")
    assert [(choice.index, choice.text) for choice in reply.choices] == [(0, first.text), (1, second.text)]
    assert reply.choices[0].finish_reason == first.done.reason
    assert reply.usage.prompt_tokens == len(tokens) + 7
    assert len(tiny_client.completions.create(model="tiny", prompt="x", extra_body={"ignore_eos": True}).choices[0].text.encode()) <= 48


def test_streams_echo_and_n(tiny_client: openai.OpenAI):
    asked = {"model": "tiny", "prompt": ["once", [256, 97]], "n": 2, "seed": 3, "max_tokens": 6, "temperature": 1}
    whole = tiny_client.completions.create(**asked, echo=True)
    texts = ["", "", "", ""]
    for chunk in tiny_client.completions.create(**asked, echo=True, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert [choice.text for choice in whole.choices] == texts
    assert [text[:4] for text in texts[:2]] == ["once"] * 2 and all(text.startswith("<|begin_of_text|>a") for text in texts[2:])
    assert chunk.usage.prompt_tokens == whole.usage.prompt_tokens == 5 + 2
    plain = tiny_client.completions.create(**asked)
    assert [choice.text for choice in plain.choices] == [texts[0][4:], texts[1][4:], *(text[18:] for text in texts[2:])]


def test_logprobs(tiny: Model, tiny_client: openai.OpenAI):
    expected = tiny.generate("once", temperature=0, max_tokens=8, logprobs=2).whole.drawn
    told = tiny_client.completions.create(**ASKED, prompt="once", logprobs=2).choices[0].logprobs
    assert told.token_logprobs == pytest.approx([drawn.logprob for drawn in expected], abs=1e-4)
    assert [set(top) for top in told.top_logprobs] == [{_name(top.data) for top in drawn.top} for drawn in expected]
    assert told.text_offset[0] == 0
    chunks = list(tiny_client.completions.create(**ASKED, prompt="once", logprobs=2, stream=True))
    tables = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    assert [token for table in tables for token in table.tokens] == told.tokens
    assert [offset for table in tables for offset in table.text_offset] == told.text_offset
    [alone] = tiny_client.completions.create(**{**ASKED, "max_tokens": 1}, prompt="once", logprobs=0).choices
    assert alone.logprobs.top_logprobs == [dict(zip(alone.logprobs.tokens, alone.logprobs.token_logprobs, strict=True))]


def test_parts_of_characters():
    rows = Table().read([Drawn(token=i, data=data, logprob=-1.0) for i, data in enumerate((b"a", b"\xe2\x98", b"\x83", b"b"))])
    assert rows["tokens"] == ["a", "bytes:\\xe2\\x98", "bytes:\\x83", "b"] and rows["text_offset"] == [0, 1, 1, 2]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt": None}, "prompt", "prompt is null; it must be a text, a list of token ids"),
        ({"prompt": []}, "prompt", "it must be a text"),
        ({"prompt": ["a", 1]}, "prompt", "it must be a text"),
        ({"prompt": [999]}, None, "token 999 is not in the vocabulary"),
        ({"suffix": "x"}, "suffix", "does not support"),
        ({"best_of": 2}, "best_of", "does not support"),
        ({"echo": True, "logprobs": 1}, "echo", "those of a prompt are not told"),
        ({"prompt": ["a"] * 20, "n": 128}, "prompt", "has 20 prompts, 128 replies each"),
        ({"model": "tinny"}, "model", "did you mean 'tiny'?"),
        ({"messages": []}, "messages", "unknown field"),
    ],
)
def test_mistakes(engine: Live, fields: dict[str, object], param: str | None, message: str):
    reply = engine.http.post("/v1/completions", json={"model": "tiny", "prompt": "x", **fields})
    error = reply.json()["error"]
    assert reply.status_code == (404 if param == "model" else 400)
    assert error["param"] == param and message in error["message"]


def test_tokenize(tiny: Model, engine: Live):
    def asked(**body: object) -> dict[str, typing.Any]:
        reply = engine.http.post("/tokenize", json=body)
        assert reply.status_code == 200, reply.text
        return reply.json()

    found = asked(model="tiny", prompt="aé", return_token_strs=True)
    assert found == {
        "count": 4,
        "max_model_len": 1024,
        "tokens": [256, 97, 0xC3, 0xA9],
        "token_strs": ["<|begin_of_text|>", "a", "�", "�"],
    }
    assert asked(prompt="a", add_special_tokens=False)["tokens"] == [97]
    messages = [{"role": "user", "content": "hi"}]
    assert asked(messages=messages)["tokens"] == tiny.prompt([Message(role="user", content=("hi",))]).tokens
    assert engine.http.post("/detokenize", json={"tokens": [256, 97, 0xC3, 0xA9]}).json() == {"prompt": "<|begin_of_text|>aé"}
    for path, body, message in [
        ("/tokenize", {}, "has neither prompt nor messages"),
        ("/tokenize", {"prompt": "x", "messages": messages}, "has both"),
        ("/detokenize", {"tokens": [512]}, "token 512 is not in the vocabulary of 512"),
    ]:
        reply = engine.http.post(path, json=body)
        assert reply.status_code == 400 and message in reply.json()["error"]["message"]


def test_models_tell_their_context(tiny: Model, engine: Live):
    room = tiny.thread.engine.context_tokens
    for told in (engine.http.get("/v1/models").json()["data"][0], engine.http.get("/v1/models/tiny").json()):
        assert (told["id"], told["context_length"], told["max_model_len"]) == ("tiny", room, room)
    assert engine.http.post("/tokenize", json={"prompt": "x"}).json()["max_model_len"] == room


def test_a_backend_without_texts_has_no_such_routes(served: Live):
    assert served.http.post("/v1/completions", json={}).status_code == 404


def test_raw_stream(engine: Live):
    reply = engine.http.post("/v1/completions", json={"model": "tiny", "prompt": "x", "max_tokens": 2, "stream": True, "timings": True})
    lines = reply.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    first, last = json.loads(lines[0][6:]), json.loads(lines[-3][6:])
    assert first["object"] == "text_completion" and first["choices"][0]["index"] == 0
    assert last["choices"] == [] and last["timings"]["predicted_n"] == 2
