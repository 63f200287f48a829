"""Every field that OpenAI's Responses API knows is honoured, refused or on the short list of those without effect; mistakes are named."""

import typing

import pytest
from openai.types import responses as types
from openai.types.responses import response_create_params, response_input_item_param
from openai.types.responses.response_format_text_json_schema_config_param import ResponseFormatTextJSONSchemaConfigParam
from openai.types.responses.response_includable import ResponseIncludable
from openai.types.shared_params import Reasoning

from herd.chat import Format, Sampling, Tool, ToolChoice
from herd.serve.responses import schema as schema
from herd.serve.responses.schema import Item, Piece, ResponsesBody
from herd.serve.wire import Wire
from tests.serve.conftest import Live, refusal
from tests.serve.echo import Echo
from tests.serve.samples import EXTENSIONS, SAMPLED_ANYWHERE

FIELDS = set(typing.get_type_hints(response_create_params.ResponseCreateParamsStreaming))
LOGPROBS = {"include": ["message.output_text.logprobs"]}

# field: (its value on the wire, what Sampling makes of it)
SAMPLED = SAMPLED_ANYWHERE | {
    "max_output_tokens": (7, {"max_tokens": 7}),
    "include": (["message.output_text.logprobs"], {"logprobs": 0}),
    "text": ({"format": {"type": "json_object"}}, {"format": Format(kind="json_object")}),
}
TOLD = {  # kept, and told again
    "metadata": {"a": "b"},
    "safety_identifier": "id",
    "user": "ann",
    "prompt_cache_key": "key",
}
OTHERWISE_HONOURED = {
    "model",
    "input",
    "instructions",
    "previous_response_id",
    "top_logprobs",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "reasoning",
    "store",
    "stream",
    "stream_options",
    "timings",
}  # tests below and in test_routes.py
REFUSED = {
    "access_programs": {"cyber": "daybreak_red"},
    "background": True,
    "background_options": {"completion_window": "2h"},
    "context_management": [{"type": "compaction"}],
    "conversation": "conv_1",
    "image": {"context_compression": "enabled"},
    "moderation": {"model": "omni-moderation-latest"},
    "prompt": {"id": "p"},
    "service_tier": "flex",
    "truncation": "auto",
}
IGNORED = {
    "max_tool_calls": 3,
    "prompt_cache_options": {"mode": "implicit"},
    "prompt_cache_retention": "24h",
}


def ask(served: Live, input: object = "one two", **fields: object) -> typing.Any:
    return served.http.post("/v1/responses", json={"model": "echo", "input": input, **fields})


def refused(served: Live, input: object = "hi", **fields: object) -> dict[str, typing.Any]:
    """The error of a request that must be a 400."""
    reply = ask(served, input, **fields)
    return refusal(reply)


def test_every_openai_field_is_in_one_group():
    honoured, neutral, ignored = set(ResponsesBody.honoured()), set(ResponsesBody.neutral), set(ResponsesBody.ignored)
    assert honoured == SAMPLED.keys() | TOLD.keys() | OTHERWISE_HONOURED
    assert neutral == REFUSED.keys()
    assert ignored == IGNORED.keys()
    assert len(honoured) + len(neutral) + len(ignored) == len(honoured | neutral | ignored)
    assert honoured | neutral | ignored == FIELDS | (EXTENSIONS - {"return_progress"}) | {
        "seed", "stop", "frequency_penalty", "presence_penalty", "logit_bias",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("wire", "params"),
    [
        (Item, types.EasyInputMessageParam),
        (Item, response_input_item_param.Message),
        (Item, types.ResponseOutputMessageParam),
        (Item, types.ResponseFunctionToolCallParam),
        (Item, response_input_item_param.FunctionCallOutput),
        (Item, response_input_item_param.ItemReference),
        (Piece, types.ResponseInputTextParam),
        (Piece, types.ResponseInputImageParam),
        (Piece, types.ResponseOutputTextParam),
        (Piece, types.ResponseOutputRefusalParam),
        (schema.ToolForm, types.FunctionToolParam),
        (schema.ChoiceForm, types.ToolChoiceFunctionParam),
        (schema.ChoiceForm, types.ToolChoiceAllowedParam),
        (schema.TextForm, types.ResponseTextConfigParam),
        (schema.FormatForm, ResponseFormatTextJSONSchemaConfigParam),
        (schema.Reasoning, Reasoning),
        (schema.StreamOptions, response_create_params.StreamOptions),
    ],
)
def test_inner_fields_are_known_too(wire: type[Wire], params: type):
    assert set(typing.get_type_hints(params)) <= {*wire.honoured(), *wire.neutral, *wire.ignored}


def test_what_can_be_included_is_known():
    assert set(typing.get_args(schema.Includable)) == set(typing.get_args(ResponseIncludable))


@pytest.mark.parametrize("field", SAMPLED)
def test_honoured(served: Live, echo: Echo, field: str):
    value, expected = SAMPLED[field]
    assert ask(served, **{field: value}).status_code == 200
    assert echo.requests[-1].sampling == Sampling(**expected)
    assert ask(served, **{field: None}).status_code == 200
    assert echo.requests[-1].sampling == Sampling()


def test_told_again(served: Live):
    tool = {"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}, "strict": False}
    form = {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}, "verbosity": "medium"}
    fields = {
        "instructions": "Be brief.", "max_output_tokens": 9, "temperature": 0.5, "top_p": 0.5, "tools": [tool], "text": form,
        "tool_choice": {"type": "function", "name": "f"}, "parallel_tool_calls": False, "store": False, "truncation": "disabled", **TOLD,
    }  # fmt: skip
    told = ask(served, **fields).json()
    assert {name: told[name] for name in fields} == fields
    assert [ask(served, tools=[tool], tool_choice=word).json()["tool_choice"] for word in ("auto", "none")] == ["auto", "none"]


@pytest.mark.parametrize("field", REFUSED)
def test_neutral_only(served: Live, echo: Echo, field: str):
    for value in (None, *ResponsesBody.neutral[field]):
        assert ask(served, **{field: value}).status_code == 200, value
        assert echo.requests[-1].sampling == Sampling()
    error = refused(served, **{field: REFUSED[field]})
    assert (error["param"], error["code"]) == (field, "unsupported_parameter")


@pytest.mark.parametrize("field", IGNORED)
def test_ignored(served: Live, echo: Echo, field: str):
    assert ask(served).status_code == ask(served, **{field: IGNORED[field]}).status_code == 200
    assert echo.requests[-1] == echo.requests[-2]


def test_tools(served: Live, echo: Echo):
    tools = [{"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True, "async": False}]
    tools.append({"type": "function", "name": "g"})
    known = (Tool(name="f", description="d", parameters={"type": "object"}, strict=True), Tool(name="g"))
    named = {"type": "function", "name": "f"}
    for choice, expected in [
        (None, ToolChoice()),
        ("required", ToolChoice(mode="required")),
        ("none", ToolChoice(mode="none")),
        (named, ToolChoice(mode="required", names=("f",))),
        ({"type": "allowed_tools", "mode": "auto", "tools": [named]}, ToolChoice(names=("f",))),
    ]:
        assert ask(served, tools=tools, tool_choice=choice).status_code == 200
        assert (echo.requests[-1].tools, echo.requests[-1].tool_choice) == (known, expected)
    ask(served, tools=tools, parallel_tool_calls=False)
    assert echo.requests[-1].tool_choice == ToolChoice(parallel=False)


def test_schemas_and_logprobs(served: Live, echo: Echo):
    form = {"type": "json_schema", "name": "n", "schema": {"type": "array"}, "description": "d"}
    for strict in (None, False, True):
        assert ask(served, text={"format": {**form, "strict": strict}}).status_code == 200
        assert echo.requests[-1].sampling.format == Format(kind="json_schema", value={"type": "array"}, strict=bool(strict))
    assert ask(served, text={"format": {"type": "text"}}, guided_regex="a").status_code == 200
    assert echo.requests[-1].sampling.format == Format(kind="regex", value="a")
    assert ask(served, **LOGPROBS, top_logprobs=5).status_code == 200
    assert echo.requests[-1].sampling.logprobs == 5


def message(*content: dict[str, object], role: str = "user") -> list[dict[str, object]]:
    return [{"role": role, "content": list(content)}]


CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "42"}
WEB = {"type": "input_image", "image_url": "https://example.com/a.png"}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"temprature": 1}, "temprature", "did you mean 'temperature'?"),
        ({"temperature": 3}, "temperature", "between 0 and 2"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "messages", "give input"),
        ({"max_tokens": 5}, "max_tokens", "give max_output_tokens"),
        ({"max_output_tokens": 0}, "max_output_tokens", "is 0"),
        ({"response_format": {"type": "json_object"}}, "response_format", "give text.format"),
        ({"n": 2}, "n", "a request for each reply"),
        ({"input": None}, "input", "it must be a string or a list of items"),
        ({"input": []}, "input", "at least 1 item"),
        ({"input": ["hi"]}, "input.0", "it must be a JSON object"),
        ({"input": [{"text": "hi"}]}, "input.0.type", "is missing"),
        ({"input": [{"type": "reasoning", "id": "rs_1", "summary": []}]}, "input.0.type", "leave out items of tools and of reasoning"),
        ({"input": [{"role": "tool", "content": "hi"}]}, "input.0.role", "'user', 'assistant'"),
        ({"input": [{"role": "user"}]}, "input.0.content", "is missing"),
        ({"input": [{"role": "user", "content": 1}]}, "input.0.content", "a string or a list of pieces"),
        ({"input": [{"role": "user", "content": "a", "name": "ann"}]}, "input.0.name", "stands in a message item"),
        ({"input": message({"type": "text", "text": "hi"})}, "input.0.content.0.type", "send text as input_text"),
        ({"input": message({"type": "input_file", "file_id": "f"})}, "input.0.content.0.type", "herd does not support"),
        ({"input": message({"type": "input_text"})}, "input.0.content.0.text", "is missing"),
        ({"input": message({"type": "input_image", "file_id": "f"})}, "input.0.content.0.file_id", "herd does not support"),
        ({"input": message({"type": "output_text", "text": "x"})}, "input.0.content.0.type", "give input_text"),
        ({"input": message(WEB)}, "input.0.content.0.image_url", "as a data: URI"),
        ({"input": message(WEB, role="assistant")}, "input.0.content.0.type", "images belong in the user's messages"),
        ({"input": [CALL]}, "input", "no output for the call 'c1' of f"),
        ({"input": [CALL, {"role": "user", "content": "well?"}, RESULT]}, "input", "no output for the call 'c1' of f"),
        ({"input": [RESULT]}, "input.0.call_id", "no call with that id waits"),
        ({"input": [CALL, RESULT, RESULT]}, "input.2.call_id", "no call with that id waits"),
        ({"input": [CALL, CALL, RESULT]}, "input.1.call_id", "a second time"),
        ({"input": [CALL, {**RESULT, "output": [WEB]}]}, "input.1.output", "what a function gives is text"),
        ({"input": [{"id": "a", **CALL}, {"id": "a", **RESULT}]}, "input.1.id", "has already"),
        ({"include": ["logprobs"]}, "include.0", "message.output_text.logprobs"),
        ({"top_logprobs": 3}, "top_logprobs", "add message.output_text.logprobs to include"),
        ({"top_logprobs": 21, **LOGPROBS}, "top_logprobs", "less than or equal to 20"),
        ({"stream_options": {}}, "stream_options", "set stream"),
        ({"stream": True, "stream_options": {"include_usage": True}}, "stream_options.include_usage", "unknown field"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", 'it takes only "medium"'),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema", "is missing"),
        ({"text": {"format": {"type": "text", "name": "n"}}}, "text.format.name", "stands in a format"),
        ({"text": {"format": {"type": "json_object"}}, "guided_regex": "a"}, "guided_regex", "text.format too"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort", 'it takes only "none"'),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "herd has no tools of its own"),
        ({"tools": [{"type": "file_search", "vector_store_ids": ["a"]}]}, "tools.0.type", "herd has no tools of its own"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools.0.function", "unknown field"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools", "a name has 1 to 64"),
        ({"tool_choice": "any"}, "tool_choice", 'it must be "auto"'),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice", 'it must be "auto"'),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice", "none of the tools"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.name", "is missing"),
        ({"metadata": {"a": 1}}, "metadata.a", "valid string"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata", "at most 16"),
        ({"metadata": {"a": "b" * 513}}, "metadata.a", "at most 512"),
        ({"previous_response_id": ""}, "previous_response_id", "there is no response '' to continue"),
        ({"previous_response_id": "resp_x"}, "previous_response_id", "there is no response 'resp_x' to continue"),
    ],
)
def test_mistakes(served: Live, fields: dict[str, object], param: str, words: str):
    error = refused(served, **fields)
    assert error["param"] == param and words in error["message"]
    for streamed in ({"stream": True},) if "stream" not in fields and "stream_options" not in fields else ():
        assert refused(served, **fields, **streamed) == error
