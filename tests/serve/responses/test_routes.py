"""OpenAI's Responses API, by its own client against a real server: whole, streamed, in the loop with functions, and continued."""

import asyncio
import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import httpx2
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter
from starlette.requests import ClientDisconnect

from herd.chat import ChatEvent, Done, Drawn, Image, Message, Text, ToolCall, ToolCallDelta, ToolCallEnd, ToolCallStart, Usage
from herd.engine.local import Local, Model
from herd.errors import HerdError, UsageError
from herd.serve.access.keys import KeyFile
from herd.serve.choices import side_by_side
from herd.serve.config import ServeConfig
from herd.serve.responses.events import Answer
from herd.serve.responses.routes import _lines, _replies
from herd.serve.sse import EventStream
from tests.serve.conftest import Live, client_of, live
from tests.serve.echo import Echo, Script, words
from tests.serve.loops import alone, goes
from tests.serve.samples import IMAGE, PARAMETERS, PIXEL, STEPS

TOOLS = [{"type": "function", "name": "get-weather", "parameters": PARAMETERS, "strict": True}, {"type": "function", "name": "clock"}]
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
LOGPROBS = "message.output_text.logprobs"


@pytest.fixture(scope="module")
def client(served: Live) -> Iterator[openai.OpenAI]:
    with client_of(served) as client:
        yield client


def events_of(served: Live, **fields: object) -> list[dict[str, Any]]:
    """What a stream says, each event checked by OpenAI's own models."""
    body = {"model": "echo", "input": "one two", "stream": True, **fields}
    text = served.http.post("/v1/responses", json=body).text
    found = []
    for line in text.removesuffix("\n\n").split("\n\n"):
        name, _, rest = line.partition("\n")
        event = json.loads(rest.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        known = EVENT.validate_python(event)
        assert not known.model_extra or event["type"] == "error"
        found.append(event)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def test_whole(client: openai.OpenAI, echo: Echo):
    reply = client.responses.create(model="echo", input="one two three", instructions="Be brief.")
    assert reply.id.startswith("resp_") and len(reply.id) == 53 and reply.object == "response" and reply.model == "echo"
    assert (reply.status, reply.output_text, reply.error, reply.incomplete_details) == ("completed", "one two three", None, None)
    assert (reply.usage.input_tokens, reply.usage.output_tokens, reply.usage.total_tokens) == (5, 3, 8)
    assert not Response.model_validate(reply.to_dict()).model_extra.keys() - {"store"}
    assert echo.requests[-1].messages == (Message(role="system", content=("Be brief.",)), Message(role="user", content=("one two three",)))


def test_cut_off(client: openai.OpenAI):
    reply = client.responses.create(model="echo", input="one two three", max_output_tokens=2)
    assert (reply.status, reply.output_text, reply.output[0].status) == ("incomplete", "one two", "incomplete")
    assert (reply.incomplete_details.reason, reply.completed_at) == ("max_output_tokens", None)
    with client.responses.create(model="echo", input="one two three", max_output_tokens=2, stream=True) as stream:
        assert [event.type for event in stream][-2:] == ["response.output_item.done", "response.incomplete"]


def test_events_of_a_text(served: Live):
    events = events_of(served)
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    assert [event["delta"] for event in events[4:6]] == ["one", " two"]
    assert {event["item_id"] for event in events if "item_id" in event} == {events[-1]["response"]["output"][0]["id"]}
    assert [event["response"]["status"] for event in (*events[:2], events[-1])] == ["in_progress", "in_progress", "completed"]
    part = {"type": "output_text", "annotations": [], "logprobs": [], "text": "one two"}
    assert events[-3]["part"] == part and events[-2]["item"]["content"] == [part] and events[-2]["item"]["status"] == "completed"


def test_events_of_calls(serve):
    events = events_of(serve(Script(STEPS)))
    kinds = [event["type"].removeprefix("response.") for event in events]
    arguments = "function_call_arguments"
    assert kinds[8:] == [
        "output_item.added", f"{arguments}.delta", f"{arguments}.delta", f"{arguments}.done", "output_item.done",
        "output_item.added", f"{arguments}.delta", f"{arguments}.done", "output_item.done", "completed",
    ]  # fmt: skip
    said, first, second = events[-1]["response"]["output"]
    assert said["content"][0]["text"] == "Let me see. "
    assert [(c["type"], c["call_id"], c["name"], c["arguments"], c["status"]) for c in (first, second)] == [
        ("function_call", "call_a", "get-weather", '{"city": "Paris", "days": 1}', "completed"),
        ("function_call", "call_b", "clock", "{}", "completed"),
    ]
    assert [event["output_index"] for event in events if event["type"] == "response.output_item.done"] == [0, 1, 2]
    assert events[-1]["response"]["usage"]["input_tokens_details"]["cached_tokens"] == 4


@st.composite
def replies(draw: st.DrawFn) -> list[ChatEvent]:
    """Texts and calls as a backend may tell them, maybe cut off."""
    events: list[ChatEvent] = [Text(text=text) for text in draw(st.lists(st.text(min_size=1, max_size=3), max_size=3))]
    for index in range(draw(st.integers(0, 3))):
        events.append(ToolCallStart(index=index, id=f"c{index}", name="f"))
        events += [ToolCallDelta(index=index, arguments=text) for text in draw(st.lists(st.text(min_size=1, max_size=3), max_size=2))]
        events.append(ToolCallEnd(index=index))
    is_cut = draw(st.booleans())
    if is_cut and events and isinstance(events[-1], ToolCallEnd):
        events.pop()
    return [*events, Done(reason="length" if is_cut else "stop", usage=Usage(prompt_tokens=1, completion_tokens=1))]


@settings(max_examples=60, deadline=None)
@given(replies())
def test_events_are_a_grammar_and_add_up(steps: list[ChatEvent]):
    async def told() -> list[dict[str, Any]]:
        async def stream() -> Any:
            for step in steps:
                yield 0, step

        head = {"id": "resp_1", "object": "response", "created_at": 1, "model": "m", "parallel_tool_calls": True, "tools": []}
        answer = Answer({**head, "tool_choice": "auto"}, lambda response: response)
        return [event async for event in answer.events(stream())]

    events = asyncio.run(told())
    letters = {
        "response.created": "c", "response.in_progress": "p", "response.output_item.added": "[", "response.content_part.added": "(",
        "response.output_text.delta": "t", "response.output_text.done": "T", "response.content_part.done": ")",
        "response.function_call_arguments.delta": "a", "response.function_call_arguments.done": "A", "response.output_item.done": "]",
        "response.completed": "!", "response.incomplete": "?",
    }  # fmt: skip
    text = "".join(letters[EVENT.validate_python(event).type] for event in events)
    assert re.fullmatch(r"cp(\[\(t*T\)\])?(\[a*A\])*(!|(\[a*\])?\?)", text), text
    assert text.count("A") == sum(isinstance(step, ToolCallEnd) for step in steps)  # a call that was cut off is never done
    output = events[-1]["response"]["output"]
    assert output == [event["item"] for event in events if event["type"] == "response.output_item.done"] and output
    for index, item in enumerate(output):
        pieces = "".join(event["delta"] for event in events if event.get("output_index") == index and "delta" in event)
        assert pieces == (item["content"][0]["text"] if item["type"] == "message" else item["arguments"])
        assert item["id"] == next(event["item"]["id"] for event in events if event.get("output_index") == index)
    assert "".join(item["content"][0]["text"] for item in output if item["type"] == "message") == "".join(
        step.text for step in steps if isinstance(step, Text)
    )


def test_log_probabilities_belong_to_the_text(serve):
    """Tokens of a call have none; tokens that a stop string cut away are told at the end."""
    drawn = [Drawn(token=i, data=data, logprob=-float(i)) for i, data in enumerate((b"Hi", b" ", b"you", b"[f()]", b"."))]
    usage = Usage(prompt_tokens=1, completion_tokens=5)
    cut = [drawn[0], Text(text="Hi"), drawn[1], drawn[2], Text(text=" you"), drawn[4], Done(reason="stop", usage=usage)]
    events = events_of(serve(Script(cut)), include=[LOGPROBS])
    deltas = [[token["token"] for token in event["logprobs"]] for event in events if event["type"] == "response.output_text.delta"]
    assert deltas == [["Hi"], [" ", "you"]]
    [said] = events[-1]["response"]["output"]
    told = [(token["token"], token["logprob"]) for token in said["content"][0]["logprobs"]]
    assert told == [("Hi", 0), (" ", -1), ("you", -2), (".", -4)]
    call = [drawn[3], ToolCallStart(index=0, id="c", name="f"), drawn[3], ToolCallEnd(index=0)]
    steps = [drawn[0], Text(text="Hi"), *call, drawn[4], Text(text="."), Done(reason="tool_calls", usage=usage)]
    first, _, last = events_of(serve(Script(steps)), include=[LOGPROBS])[-1]["response"]["output"]
    assert [[token["token"] for token in item["content"][0]["logprobs"]] for item in (first, last)] == [["Hi"], ["."]]


def test_the_clients_stream_helper(serve):
    with client_of(serve(Script(STEPS))) as client:
        with client.responses.stream(model="echo", input="hi", tools=TOOLS) as stream:
            snapshots = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
            final = stream.get_final_response()
        assert snapshots == ["Let me see. "] and final.output_text == "Let me see. "
        assert final.output[1].parsed_arguments == {"city": "Paris", "days": 1}
        # what came can be sent back as it came
        results = [{"type": "function_call_output", "call_id": call.call_id, "output": "x"} for call in final.output[1:]]
        client.responses.create(model="echo", input=[{"role": "user", "content": "hi"}, *final.output, *results])


def test_async_client(served: Live):
    async def ask(client: openai.AsyncOpenAI, i: int) -> bool:
        text = " ".join(f"{i}-{word}" for word in range(10))
        if i % 3 == 0:
            return (await client.responses.create(model="echo", input=text)).output_text == text
        if i % 3 == 1:
            stream = await client.responses.create(model="echo", input=text, stream=True)
            return "".join([event.delta async for event in stream if event.type == "response.output_text.delta"]) == text
        async with client.responses.stream(model="echo", input=text) as events:
            return (await events.get_final_response()).output_text == text

    async def ask_all() -> list[bool]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, i) for i in range(12)))

    assert all(asyncio.run(ask_all()))


def test_items(client: openai.OpenAI, echo: Echo):
    picture = {"type": "input_image", "image_url": IMAGE["image_url"]["url"], "detail": "auto"}
    client.responses.create(
        model="echo",
        input=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [picture, {"type": "input_text", "text": "what?"}]},
            {"role": "assistant", "content": "let me see"},
            {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}', "id": "fc_1", "status": "completed"},
            {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "{}"},
            {"type": "function_call", "call_id": "c3", "name": "g", "arguments": '{"cut', "status": "incomplete"},
            {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "42"}]},
            {"type": "function_call_output", "call_id": "c1", "output": "rain"},
            {"type": "message", "role": "user", "content": "so?"},
        ],
    )
    calls = (ToolCall(id="c1", name="f", arguments='{"a": 1}'), ToolCall(id="c2", name="g", arguments="{}"))
    assert echo.requests[-1].messages == (
        Message(role="system", content=("Be brief.",)),
        Message(role="user", content=(Image(data=PIXEL), "what?")),
        Message(role="assistant", content=("let me see",), tool_calls=calls),
        Message(role="tool", content=("42",), tool_call_id="c2"),
        Message(role="tool", content=("rain",), tool_call_id="c1"),
        Message(role="user", content=("so?",)),
    )


def test_continued(client: openai.OpenAI, echo: Echo):
    picture = {"type": "input_image", "image_url": IMAGE["image_url"]["url"], "detail": "auto"}
    content = [picture, {"type": "input_text", "text": "one"}]
    first = client.responses.create(model="echo", instructions="A", input=[{"role": "user", "content": content}])
    second = client.responses.create(model="echo", instructions="B", input="two", previous_response_id=first.id, store=False)
    with client.responses.stream(model="echo", input="three", previous_response_id=first.id) as stream:
        branch = stream.get_final_response()
    assert (second.previous_response_id, branch.previous_response_id) == (first.id, first.id)
    begun = (Message(role="user", content=(Image(data=PIXEL), "one")), Message(role="assistant", content=("one",)))
    assert echo.requests[-2].messages == (Message(role="system", content=("B",)), *begun, Message(role="user", content=("two",)))
    assert echo.requests[-1].messages == (*begun, Message(role="user", content=("three",)))
    said = client.responses.create(model="echo", input="four", previous_response_id=branch.id)
    assert echo.requests[-1].messages[:2] == begun
    assert [(m.role, m.text) for m in echo.requests[-1].messages[2:]] == [("user", "three"), ("assistant", "three"), ("user", "four")]
    with pytest.raises(openai.BadRequestError, match="there is no response") as caught:
        client.responses.create(model="echo", input="x", previous_response_id=second.id)
    assert (caught.value.param, caught.value.code) == ("previous_response_id", "previous_response_not_found")
    with pytest.raises(openai.BadRequestError, match="send only what is new"):
        client.responses.create(model="echo", input=[said.output[0], {"role": "user", "content": "x"}], previous_response_id=said.id)


def test_retrieved_and_deleted(client: openai.OpenAI):
    made = client.responses.create(model="echo", input="one", metadata={"a": "b"}, user="ann")
    assert client.responses.retrieve(made.id, include=[LOGPROBS]).to_dict() == made.to_dict()
    after = client.responses.create(model="echo", input="two", previous_response_id=made.id)
    last = client.responses.create(model="echo", input="three", previous_response_id=after.id)
    with pytest.raises(openai.BadRequestError, match="made in the background"):
        client.responses.cancel(made.id)
    client.responses.delete(after.id)
    for lost in (client.responses.retrieve, client.responses.delete, client.responses.cancel, client.responses.input_items.list):
        with pytest.raises(openai.NotFoundError, match="there is no response") as caught:
            lost(after.id)
        assert caught.value.param == "response_id"
    assert client.responses.retrieve(made.id).id == made.id and client.responses.retrieve(last.id).output_text == "three"
    assert client.responses.create(model="echo", input="x", previous_response_id=made.id).status == "completed"
    with pytest.raises(openai.BadRequestError, match=r"cannot be continued.*was deleted"):
        client.responses.create(model="echo", input="x", previous_response_id=last.id)


def test_input_items(served: Live, client: openai.OpenAI):
    first = client.responses.create(model="echo", input=[{"role": "user", "content": f"n{i}"} for i in range(4)])
    second = client.responses.create(model="echo", input="n5", previous_response_id=first.id)

    def texts(**how: Any) -> list[str]:
        return [item.content[0].text for item in client.responses.input_items.list(second.id, **how)]  # page after page

    assert texts(order="asc") == ["n0", "n1", "n2", "n3", "n3", "n5"] and texts() == texts(order="asc")[::-1]
    assert texts(limit=1) == texts(limit=2) == texts() and texts(order="asc", limit=4) == texts()[::-1]
    page = client.responses.input_items.list(second.id, limit=2)
    assert (page.has_more, page.first_id, page.last_id) == (True, page.data[0].id, page.data[1].id)
    assert not client.responses.input_items.list(second.id, limit=6).has_more
    for query, param in [("limit=0", "limit"), ("limit=x", "limit"), ("order=up", "order"), ("after=msg_x", "after"), ("page=2", "page")]:
        reply = served.http.get(f"/v1/responses/{second.id}/input_items?{query}")
        assert reply.status_code == 400 and reply.json()["error"]["param"] == param
    wrong = [("stream=true", "stream"), ("include=x", "include.0"), ("include[]=x", "include.0"), ("starting_after=2", "starting_after")]
    for query, param in wrong:
        reply = served.http.get(f"/v1/responses/{second.id}?{query}")
        assert reply.status_code == 400 and reply.json()["error"]["param"] == param


def test_items_by_reference(client: openai.OpenAI, echo: Echo):
    made = client.responses.create(model="echo", input="one")
    reference = {"type": "item_reference", "id": made.output[0].id}
    client.responses.create(model="echo", input=[{"role": "user", "content": "one"}, reference, {"role": "user", "content": "two"}])
    assert [(m.role, m.text) for m in echo.requests[-1].messages] == [("user", "one"), ("assistant", "one"), ("user", "two")]
    client.responses.create(model="echo", input=[{"id": made.output[0].id}])
    with pytest.raises(openai.NotFoundError, match="there is no item 'msg_x'") as caught:
        client.responses.create(model="echo", input=[{"type": "item_reference", "id": "msg_x"}])
    assert caught.value.param == "input.0.id"


def test_callers_see_their_own(serve, tmp_path: Path):
    file = KeyFile(tmp_path / "keys.json")
    served = serve(Echo(), ServeConfig(port=0, keys_file=(file.make("x"), file.path)[1], drain_s=1))
    with client_of(served, file.make("ann")) as ann, client_of(served, file.make("bob")) as bob:
        made = ann.responses.create(model="echo", input="one")
        for door in (bob.responses.retrieve, bob.responses.delete, bob.responses.cancel, bob.responses.input_items.list):
            with pytest.raises(openai.NotFoundError):
                door(made.id)
        with pytest.raises(openai.BadRequestError, match="there is no response"):
            bob.responses.create(model="echo", input="x", previous_response_id=made.id)
        with pytest.raises(openai.NotFoundError, match="there is no item"):
            bob.responses.create(model="echo", input=[{"type": "item_reference", "id": made.output[0].id}])
        assert ann.responses.retrieve(made.id).output_text == "one"


def test_a_restart_loses_nothing(tmp_path: Path):
    config = ServeConfig(port=0, data_folder=tmp_path, drain_s=1)
    echo = Echo()
    with live(echo, config) as served, client_of(served) as client:
        made = client.responses.create(model="echo", input="one")
    with live(echo, config) as served, client_of(served) as client:
        assert client.responses.retrieve(made.id).to_dict() == made.to_dict()
        client.responses.create(model="echo", input="two", previous_response_id=made.id)
    assert [message.text for message in echo.requests[-1].messages] == ["one", "one", "two"]


def test_a_server_may_keep_nothing(serve):
    with client_of(serve(Echo(), ServeConfig(port=0, responses_gib=0, drain_s=1))) as client:
        made = client.responses.create(model="echo", input="one")
        assert made.to_dict()["store"] is False
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(made.id)
        with pytest.raises(openai.BadRequestError, match="this server keeps no responses") as caught:
            client.responses.create(model="echo", input="one", store=True)
        assert caught.value.param == "store"


def test_a_conversation_that_is_too_large_to_keep(serve):
    with client_of(serve(Echo(), ServeConfig(port=0, responses_gib=2000 / (1 << 30), drain_s=1))) as client:
        made = client.responses.create(model="echo", input="one")
        with pytest.raises(openai.BadRequestError, match="this server keeps 2,000 of all") as caught:
            client.responses.create(model="echo", input="x" * 2000, previous_response_id=made.id)
        assert caught.value.param == "store"
        assert client.responses.create(model="echo", input="x" * 2000, store=False).status == "completed"


def test_failures(serve, client: openai.OpenAI):
    with pytest.raises(openai.NotFoundError, match="did you mean 'echo'"):
        client.responses.create(model="ecko", input="x")
    served = serve(Script([Text(text="half"), HerdError("the engine has stopped")]))
    with client_of(served) as broken:
        with pytest.raises(openai.InternalServerError, match="the engine has stopped"):
            broken.responses.create(model="echo", input="x")
        seen = []
        with pytest.raises(openai.APIError, match="the engine has stopped"):
            for event in broken.responses.create(model="echo", input="x", stream=True):
                seen.append(event)
        assert seen[-1].type == "response.failed" and seen[-1].response.error.code == "server_error"
        with broken.responses.stream(model="echo", input="x") as stream, pytest.raises(openai.APIError, match="the engine has stopped"):
            stream.get_final_response()
        with pytest.raises(openai.NotFoundError):
            broken.responses.retrieve(seen[-1].response.id)
    events = events_of(served)
    assert [event["type"] for event in events[-2:]] == ["response.failed", "error"]
    assert events[-1] | {"sequence_number": 0} == {
        "type": "error", "sequence_number": 0, "code": "server_error", "message": "the engine has stopped", "param": None,
        "error": {"type": "server_error", "code": None, "message": "the engine has stopped", "param": None},
    }  # fmt: skip


def test_failures_before_the_first_event(serve):
    error = UsageError("a prompt of 9 tokens", "send less", param="messages")
    for streamed in (False, True):  # the status line can still tell
        with client_of(serve(Script([error]))) as client, pytest.raises(openai.BadRequestError, match="a prompt of 9") as caught:
            client.responses.create(model="echo", input="x", stream=streamed)
        assert caught.value.param == "input"
    served = serve(Script([0.3, UsageError("a prompt of 9 tokens", param="messages")]), ServeConfig(port=0, ping_s=0.05, drain_s=1))
    lines = served.http.post("/v1/responses", json={"model": "echo", "input": "x", "stream": True}).text.split("\n\n")
    assert lines[0] == ": ping" and lines[-2].startswith('event: error\ndata: {"type":"error","sequence_number":0,')


def test_a_stop_of_the_server(serve):
    served = serve(Script([Text(text="half"), 60.0, *words("never")]), ServeConfig(port=0, drain_s=1))
    with (
        client_of(served) as client,
        client.responses.create(model="echo", input="x", stream=True) as stream,
        pytest.raises(openai.APIError, match="the server is stopping"),
    ):
        for event in stream:
            if event.type == "response.output_text.delta":
                served.server.should_exit = True


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_the_work(serve, stream: bool):
    script = Script([Text(text="half"), 60.0, *words("never")])
    served = serve(script)
    body = {"model": "echo", "input": "x", "stream": stream}
    with httpx2.Client(base_url=served.url, timeout=0.5) as http, pytest.raises(httpx2.ReadTimeout):
        http.post("/v1/responses", json=body)
    assert script.closed.wait(5)


def test_a_client_that_leaves_while_a_line_is_written():
    """The backend is not at work then, and is still closed, by the task that read from it."""

    async def run() -> None:
        script = Script([*words(*["one"] * 50)])
        answer = Answer({"id": "resp_1"}, lambda response: response)

        async def stuck(_: object) -> None:
            await asyncio.sleep(60)

        lines = _lines(answer.events(side_by_side([_replies(script, None)])))
        with pytest.raises(ClientDisconnect):
            await EventStream(lines, ServeConfig(), answer.failure)({}, goes, stuck)
        assert script.closed.is_set()

    alone(run())


def test_parse_gives_a_model_of_pydantics(tiny_client: openai.OpenAI):
    class Weather(BaseModel):
        city: Literal["Paris", "Oslo"]
        is_wet: bool

    reply = tiny_client.responses.parse(model="tiny", input="Weather?", text_format=Weather, extra_body={"seed": 2})
    assert isinstance(reply.output_parsed, Weather) and reply.status == "completed"
    assert reply.text.format.name == "Weather" and reply.text.format.strict
    with tiny_client.responses.stream(model="tiny", input="Weather?", text_format=Weather, extra_body={"seed": 2}) as stream:
        assert stream.get_final_response().output_parsed == reply.output_parsed
    # and it can be sent back as it came
    tiny_client.responses.create(
        model="tiny", input=[{"role": "user", "content": "Weather?"}, *reply.output, {"role": "user", "content": "?"}], max_output_tokens=1
    )


def test_a_schema_that_cannot_be_enforced(tiny_client: openai.OpenAI):
    form = {"type": "json_schema", "name": "n", "strict": True, "schema": {"type": "array", "uniqueItems": True}}
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="uniqueItems") as caught:
            tiny_client.responses.create(model="tiny", input="x", text={"format": form}, stream=stream)
        assert caught.value.param == "text.format"


def test_it_is_the_reply_of_chat_completions(tiny_client: openai.OpenAI):
    """Two APIs, one reply: text, usage and log-probabilities."""
    asked: dict[str, Any] = {"model": "tiny", "temperature": 0.7, "top_logprobs": 2}
    chat = tiny_client.chat.completions.create(
        messages=[{"role": "system", "content": "A"}, {"role": "user", "content": "B"}], max_tokens=12, logprobs=True, seed=5, **asked
    )
    made = tiny_client.responses.create(
        instructions="A", input="B", max_output_tokens=12, include=[LOGPROBS], extra_body={"seed": 5, "timings": True}, **asked
    )
    assert made.output_text == chat.choices[0].message.content
    assert (made.usage.input_tokens, made.usage.output_tokens) == (chat.usage.prompt_tokens, chat.usage.completion_tokens)
    told = [token.model_dump() for token in made.output[0].content[0].logprobs]
    assert told == [token.model_dump() for token in chat.choices[0].logprobs.content] and len(told[0]["top_logprobs"]) == 2
    assert made.to_dict()["timings"]["predicted_n"] == 12


@pytest.mark.weights
def test_the_loop_with_functions(cria: Model):
    with live(Local([cria])) as served, client_of(served) as client:
        loop_with_functions(client)


def loop_with_functions(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "cria", "tools": TOOLS[:1], "max_output_tokens": 200, "extra_body": {"seed": 1}}
    made = client.responses.create(input="Weather?", tool_choice="required", parallel_tool_calls=False, **asked)
    [call] = [item for item in made.output if item.type == "function_call"]
    assert json.loads(call.arguments)["city"] in ("Paris", "Oslo") and call.status == "completed"
    with pytest.raises(openai.BadRequestError, match=f"there is no output for the call '{call.call_id}'"):
        client.responses.create(input="well?", previous_response_id=made.id, **asked)
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    after = client.responses.create(input=[result], previous_response_id=made.id, tool_choice="none", **asked)
    by_hand = client.responses.create(
        input=[{"role": "user", "content": "Weather?"}, *made.output, result], tool_choice="none", store=False, **asked
    )
    assert after.output_text == by_hand.output_text and after.usage.input_tokens == by_hand.usage.input_tokens


def test_a_chain_computes_only_what_is_new(tiny_client: openai.OpenAI):
    cached, previous = [], None
    for turn in range(4):
        count = tiny_client.responses.input_tokens.count(model="tiny", input=f"turn {turn} " * 8, previous_response_id=previous)
        made = tiny_client.responses.create(
            model="tiny", input=f"turn {turn} " * 8, previous_response_id=previous, max_output_tokens=20, extra_body={"seed": turn}
        )
        assert made.usage.input_tokens == count.input_tokens
        previous = made.id
        cached.append(made.usage.input_tokens_details.cached_tokens)
    assert all(after >= before + 64 for before, after in pairwise(cached)), cached
    assert made.usage.input_tokens - cached[-1] < 160
