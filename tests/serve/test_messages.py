"""Anthropic's own client against a real server."""

import json
import typing
from collections.abc import Iterator

import anthropic
import pytest
from anthropic.types import message_count_tokens_params, message_create_params

from herd.chat import Done, Format, Message, Text, Tool, ToolCall, ToolChoice, Usage
from herd.engine.local import Local, Model
from herd.errors import HerdError
from herd.serve.messages import CountBody, MessagesBody
from tests.serve.conftest import Live, live
from tests.serve.echo import Echo, Script
from tests.serve.samples import IMAGE, PIXEL, STEPS

HELLO = [{"role": "user", "content": "one two three"}]
WEATHER = {"name": "get-weather", "description": "tells it", "input_schema": {"type": "object"}}


def client_of(served: Live) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def client(served: Live) -> Iterator[anthropic.Anthropic]:
    with client_of(served) as client:
        yield client


@pytest.mark.parametrize(
    ("form", "params", "more"),
    [
        (MessagesBody, message_create_params.MessageCreateParamsStreaming, {"temperature", "top_p", "top_k"}),
        (CountBody, message_count_tokens_params.MessageCountTokensParams, set()),
    ],
)
def test_every_field_is_in_one_group(form: type[CountBody], params: type, more: set[str]):
    groups = [form.honoured(), form.neutral, form.ignored]
    known = {name for group in groups for name in group}
    assert known == set(typing.get_type_hints(params)) | more and sum(map(len, groups)) == len(known)


def test_whole_and_streamed(client: anthropic.Anthropic, echo: Echo):
    reply = client.messages.create(model="echo", max_tokens=9, messages=HELLO, system="Be brief.", stop_sequences=["x"])
    assert [(block.type, block.text) for block in reply.content] == [("text", "one two three")]
    assert (reply.stop_reason, reply.usage.input_tokens, reply.usage.output_tokens) == ("end_turn", 5, 3)
    asked = echo.requests[-1]
    assert asked.messages[0] == Message(role="system", content=("Be brief.",))
    assert (asked.sampling.max_tokens, asked.sampling.stop) == (9, ("x",))
    with client.messages.stream(model="echo", max_tokens=2, messages=HELLO) as stream:
        assert "".join(stream.text_stream) == "one two"
        final = stream.get_final_message()
    assert (final.content[0].text, final.stop_reason, final.usage.input_tokens) == ("one two", "max_tokens", 3)


def test_structured_output(client: anthropic.Anthropic, echo: Echo):
    wanted = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"], "additionalProperties": False}
    form = {"type": "json_schema", "schema": wanted}
    for config in ({"format": form}, {"format": form, "effort": "high"}):
        client.messages.create(model="echo", max_tokens=9, messages=HELLO, output_config=config)
        assert echo.requests[-1].sampling.format == Format(kind="json_schema", value=wanted, strict=True)
    for config in ({}, {"format": None}):
        client.messages.create(model="echo", max_tokens=9, messages=HELLO, output_config=config)
        assert echo.requests[-1].sampling.format is None


def test_a_stop_string_is_told(serve):
    done = Done(reason="stop", stop="END", usage=Usage(prompt_tokens=3, completion_tokens=2))
    with client_of(serve(Script([Text(text="one"), done]))) as client:
        asked = {"model": "echo", "max_tokens": 9, "messages": HELLO, "stop_sequences": ["END"]}
        whole = client.messages.create(**asked)
        with client.messages.stream(**asked) as stream:
            streamed = stream.get_final_message()
    for reply in (whole, streamed):
        assert (reply.stop_reason, reply.stop_sequence, reply.content[0].text) == ("stop_sequence", "END", "one")


def test_calls(serve):
    served = serve(Script(STEPS))
    with client_of(served) as client:
        whole = client.messages.create(model="echo", max_tokens=9, messages=HELLO, tools=[WEATHER])
        with client.messages.stream(model="echo", max_tokens=9, messages=HELLO, tools=[WEATHER]) as stream:
            streamed = stream.get_final_message()
    for reply in (whole, streamed):
        text, first, second = reply.content
        assert (text.text, first.type, first.id, first.name) == ("Let me see. ", "tool_use", "call_a", "get-weather")
        assert first.input == {"city": "Paris", "days": 1} and second.input == {}
        assert reply.stop_reason == "tool_use" and reply.usage.cache_read_input_tokens == 4 and reply.usage.input_tokens == 5
    body = {"model": "echo", "max_tokens": 9, "messages": HELLO, "stream": True}
    lines = served.http.post("/v1/messages", json=body).text.split("\n\n")
    kinds = [line.partition("\n")[0].removeprefix("event: ") for line in lines[:-1]]
    pair = ["content_block_start", "content_block_delta"]
    assert kinds == [
        "message_start", *pair, "content_block_stop", *pair, "content_block_delta", "content_block_stop",
        *pair, "content_block_stop", "message_delta", "message_stop",
    ]  # fmt: skip
    assert all(json.loads(line.partition("data: ")[2])["type"] == kind for line, kind in zip(lines, kinds, strict=False))


def test_history(client: anthropic.Anthropic, echo: Echo):
    source = {"type": "base64", "media_type": "image/png", "data": IMAGE["image_url"]["url"].partition(",")[2]}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": "rain", "is_error": True}
    messages = [
        {"role": "user", "content": [{"type": "image", "source": source}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "get-weather", "input": {"city": "Oslo"}}]},
        {"role": "user", "content": [result, {"type": "text", "text": "so?"}]},
    ]
    choice = {"type": "tool", "name": "get-weather", "disable_parallel_tool_use": True}
    client.messages.create(model="echo", max_tokens=9, messages=messages, tools=[WEATHER], tool_choice=choice)
    asked = echo.requests[-1]
    assert asked.messages[0].content[0].data == PIXEL and asked.messages[0].text == "what?"
    assert asked.messages[1].tool_calls == (ToolCall(id="t1", name="get-weather", arguments='{"city": "Oslo"}'),)
    assert [(m.role, m.text, m.tool_call_id) for m in asked.messages[2:]] == [("tool", "Error: rain", "t1"), ("user", "so?", None)]
    assert asked.tools == (Tool(name="get-weather", description="tells it", parameters={"type": "object"}),)
    assert asked.tool_choice == ToolChoice(mode="required", names=("get-weather",), parallel=False)


def test_count_tokens(tiny: Model):
    with live(Local([tiny])) as served, client_of(served) as client:
        counted = client.messages.count_tokens(model="tiny", messages=HELLO).input_tokens
        assert counted == client.messages.create(model="tiny", max_tokens=1, messages=HELLO).usage.input_tokens
        stream = client.messages.create(model="tiny", max_tokens=1, messages=[*HELLO, *HELLO], stream=True)
        start, *_, last, _ = stream
        form = {"format": {"type": "json_schema", "schema": {"type": "object"}}}
        assert client.messages.count_tokens(model="tiny", messages=HELLO, output_config=form).input_tokens == counted
        held = {"format": {"type": "json_schema", "schema": {"const": 42}}}
        reply = client.messages.create(model="tiny", max_tokens=9, messages=HELLO, output_config=held)
        assert (reply.content[0].text, reply.stop_reason) == ("42", "end_turn")
        told = last.usage.input_tokens + last.usage.cache_read_input_tokens
        assert start.message.usage.input_tokens == told > counted and last.usage.cache_read_input_tokens > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"thinking": {"type": "enabled", "budget_tokens": 9}}, "thinking is"),
        ({"max_tokens": None}, "max_tokens is null"),
        ({"output_config": {"effort": "low"}}, 'output_config.effort is "low", which herd does not support; it takes only "high"'),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema is missing"),
        ({"output_config": {"format": {"type": "xml", "schema": {}}}}, "output_config.format.type is"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name is null"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "http://x"}}]}]},
            "start the server with --image-urls",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text", "id": "x"}]}]}, "content.0.text is missing"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]}]}, "only the assistant"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": ""}, {"type": "tool_result", "tool_use_id": "1"}]}]}, "first"),
    ],
)
def test_mistakes(served: Live, fields: dict[str, object], message: str):
    reply = served.http.post("/v1/messages", json={"model": "echo", "max_tokens": 1, "messages": HELLO, **fields})
    body = reply.json()
    assert reply.status_code == 400 and body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
    assert message in body["error"]["message"]


def test_failures(serve, client: anthropic.Anthropic):
    with pytest.raises(anthropic.NotFoundError, match="did you mean 'echo'"):
        client.messages.create(model="ecko", max_tokens=1, messages=HELLO)
    served = serve(Script([Text(text="half"), HerdError("the engine has stopped")]))
    with client_of(served) as broken, pytest.raises(anthropic.APIStatusError, match="the engine has stopped"):
        list(broken.messages.create(model="echo", max_tokens=1, messages=HELLO, stream=True))
