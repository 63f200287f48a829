"""Calls of tools over the wire: OpenAI's client in the whole loop, chunks to the letter, and a real engine held to a schema."""

import json
from collections.abc import Iterator
from typing import Literal

import openai
import pytest
from pydantic import BaseModel

from herd.chat import ToolCall
from herd.engine.local import Local, Model
from tests.serve.conftest import Live, client_of, live
from tests.serve.echo import Script
from tests.serve.samples import PARAMETERS, STEPS

WEATHER = {"type": "function", "function": {"name": "get-weather", "parameters": PARAMETERS, "strict": True}}
CLOCK = {"type": "function", "function": {"name": "clock"}}
HELLO = [{"role": "user", "content": "What is the weather?"}]


def test_whole(serve):
    reply = serve(Script(STEPS)).chat().json()
    [choice] = reply["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"] == {
        "role": "assistant",
        "content": "Let me see. ",
        "refusal": None,
        "tool_calls": [
            {"id": "call_a", "type": "function", "function": {"name": "get-weather", "arguments": '{"city": "Paris", "days": 1}'}},
            {"id": "call_b", "type": "function", "function": {"name": "clock", "arguments": "{}"}},
        ],
    }
    assert reply["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}


def test_calls_alone_have_no_content(serve):
    assert serve(Script(STEPS[1:])).chat().json()["choices"][0]["message"]["content"] is None


def test_chunks(serve):
    lines = serve(Script(STEPS)).chat(stream=True).text.split("\n\n")[:-2]
    choices = [json.loads(line[6:])["choices"][0] for line in lines]
    assert [choice["delta"] for choice in choices] == [
        {"role": "assistant", "content": ""},
        {"content": "Let me see. "},
        {"tool_calls": [{"index": 0, "id": "call_a", "type": "function", "function": {"name": "get-weather", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"city": "Pa'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": 'ris", "days": 1}'}}]},
        {"tool_calls": [{"index": 1, "id": "call_b", "type": "function", "function": {"name": "clock", "arguments": ""}}]},
        {"tool_calls": [{"index": 1, "function": {"arguments": "{}"}}]},
        {},
    ]
    assert [choice["finish_reason"] for choice in choices] == [None] * 7 + ["tool_calls"]


def test_a_stream_of_calls_alone_has_no_content(serve):
    lines = serve(Script(STEPS[1:])).chat(stream=True).text.split("\n\n")
    assert json.loads(lines[0][6:])["choices"][0]["delta"] == {"role": "assistant", "content": None}


def test_the_clients_stream_helper(serve):
    served = serve(Script(STEPS))
    with client_of(served) as client:
        with client.chat.completions.stream(model="echo", messages=HELLO, tools=[WEATHER]) as stream:
            message = stream.get_final_completion().choices[0].message
        assert [(call.id, call.function.name) for call in message.tool_calls] == [("call_a", "get-weather"), ("call_b", "clock")]
        assert message.tool_calls[0].function.parsed_arguments == {"city": "Paris", "days": 1}
        # and it can be sent back as it came
        results = [{"role": "tool", "tool_call_id": call.id, "content": "x"} for call in message.tool_calls]
        for said in (message, message.model_dump()):
            client.chat.completions.create(model="echo", messages=[*HELLO, said, *results])


@pytest.fixture(scope="module")
def cria_client(cria: Model) -> Iterator[openai.OpenAI]:
    with live(Local([cria])) as server, client_of(server) as client:
        yield client


@pytest.mark.weights
@pytest.mark.parametrize("stream", [False, True])
def test_the_loop_with_an_engine(cria: Model, cria_client: openai.OpenAI, stream: bool):
    """A reply held to a call; the result goes back, and the second reply's prompt is what Python's API makes of it."""
    asked = {
        "model": "cria",
        "messages": HELLO,
        "tools": [WEATHER, CLOCK],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "seed": 1,
    }
    named = {"type": "function", "function": {"name": "get-weather"}}
    if stream:
        with cria_client.chat.completions.stream(**{**asked, "tool_choice": named}) as events:
            choice = events.get_final_completion().choices[0]
    else:
        choice = cria_client.chat.completions.create(**{**asked, "tool_choice": named}).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    [call] = choice.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "get-weather" and arguments["city"] in ("Paris", "Oslo") and arguments["days"] in (1, 2, 3)
    result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    history = [*HELLO, choice.message, result]
    reply = cria_client.chat.completions.create(model="cria", messages=history, tools=[WEATHER, CLOCK], tool_choice="none", max_tokens=1)
    said = {"role": "assistant", "content": "", "tool_calls": [ToolCall(id=call.id, name="get-weather", arguments=call.function.arguments)]}
    expected = cria.chat([*HELLO, said, result], tools=[WEATHER, CLOCK], tool_choice="none", max_tokens=1)
    assert reply.usage.prompt_tokens == expected.whole.done.usage.prompt_tokens
    assert reply.choices[0].message.tool_calls is None


def test_parse_gives_a_model_of_pydantics(tiny_client: openai.OpenAI):
    class Weather(BaseModel):
        city: Literal["Paris", "Oslo"]
        is_wet: bool
        sky: Literal["blue", "grey"]

    reply = tiny_client.chat.completions.parse(model="tiny", messages=HELLO, response_format=Weather, seed=2, n=2)
    assert len(reply.choices) == 2
    for choice in reply.choices:
        assert isinstance(choice.message.parsed, Weather) and choice.finish_reason == "stop"


def test_a_schema_that_cannot_be_enforced(tiny_client: openai.OpenAI):
    form = {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": {"type": "array", "uniqueItems": True}}}
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="uniqueItems") as caught:
            tiny_client.chat.completions.create(model="tiny", messages=HELLO, response_format=form, stream=stream)
        assert caught.value.param == "response_format"


@pytest.mark.parametrize(
    ("fields", "allowed"),
    [
        ({"structured_outputs": {"choice": ["yes", "no"]}}, {"yes", "no"}),
        ({"guided_regex": "(ab){2}|c"}, {"abab", "c"}),
        ({"guided_grammar": 'root ::= "x" | "yy"'}, {"x", "yy"}),
        ({"structured_outputs": {"grammar": 'start: "x" | "yy"'}}, {"x", "yy"}),
    ],
)
def test_structured_outputs(tiny_client: openai.OpenAI, fields: dict[str, object], allowed: set[str]):
    reply = tiny_client.chat.completions.create(model="tiny", messages=HELLO, n=4, extra_body=fields)
    assert {choice.message.content for choice in reply.choices} <= allowed


def test_raw(served: Live):
    """What curl would send."""
    body = b'{"model":"echo","messages":[{"role":"user","content":"hi"}],"tools":[{"type":"function","function":{"name":"f"}}]}'
    reply = served.http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 200 and reply.json()["choices"][0]["message"]["content"] == "hi"
