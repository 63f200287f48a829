"""Every field that OpenAI knows is honoured, refused or on the short list of those without effect; every mistake is named."""

import typing

import pytest
from openai.types.chat import completion_create_params as openai_params
from openai.types.chat.chat_completion_assistant_message_param import ChatCompletionAssistantMessageParam
from openai.types.chat.chat_completion_content_part_image_param import ChatCompletionContentPartImageParam, ImageURL
from openai.types.chat.chat_completion_content_part_text_param import ChatCompletionContentPartTextParam
from openai.types.chat.chat_completion_developer_message_param import ChatCompletionDeveloperMessageParam
from openai.types.chat.chat_completion_function_tool_param import ChatCompletionFunctionToolParam
from openai.types.chat.chat_completion_message_function_tool_call_param import ChatCompletionMessageFunctionToolCallParam, Function
from openai.types.chat.chat_completion_stream_options_param import ChatCompletionStreamOptionsParam
from openai.types.chat.chat_completion_system_message_param import ChatCompletionSystemMessageParam
from openai.types.chat.chat_completion_tool_message_param import ChatCompletionToolMessageParam
from openai.types.chat.chat_completion_user_message_param import ChatCompletionUserMessageParam
from openai.types.shared_params import FunctionDefinition
from openai.types.shared_params.response_format_json_schema import JSONSchema

from herd.chat import Format, Sampling, Tool, ToolCall, ToolChoice
from herd.serve import schema
from herd.serve.schema import ChatBody, ChatMessage, ImageUrl, Part, StreamOptions
from herd.serve.wire import Wire
from tests.serve.conftest import Live, refusal
from tests.serve.echo import Echo
from tests.serve.samples import EXTENSIONS, OF_RIVALS, SAMPLED_ANYWHERE

FIELDS = set(typing.get_type_hints(openai_params.CompletionCreateParamsStreaming))

# field: (its value on the wire, what Sampling makes of it)
SAMPLED = SAMPLED_ANYWHERE | {
    "max_completion_tokens": (7, {"max_tokens": 7}),
    "max_tokens": (7, {"max_tokens": 7}),
    "logprobs": (True, {"logprobs": 0}),
    "response_format": ({"type": "json_object"}, {"format": Format(kind="json_object")}),
}
OTHERWISE_HONOURED = {
    "model",
    "messages",
    "stream",
    "stream_options",
    "prompt_cache_key",
    "n",
    "timings",
    "return_progress",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "top_logprobs",
}  # tests below, in test_api.py, test_sse.py, test_choices.py, test_tools.py, test_river.py
OF_RIVALS_CHAT = {
    "add_generation_prompt": False,
    "chat_template": "{{ messages }}",
    "chat_template_kwargs": {"enable_thinking": True},
    "continue_final_message": True,
}

REFUSED = {
    **OF_RIVALS,
    **OF_RIVALS_CHAT,
    "audio": {"voice": "alloy", "format": "wav"},
    "function_call": {"name": "f"},
    "functions": [{"name": "f"}],
    "modalities": ["text", "audio"],
    "moderation": {"model": "omni-moderation-latest"},
    "prediction": {"type": "content", "content": "x"},
    "reasoning_effort": "high",
    "service_tier": "flex",
    "store": True,
    "verbosity": "low",
    "web_search_options": {},
}

IGNORED = {
    "metadata": {"a": "b"},
    "prompt_cache_options": {"mode": "implicit"},
    "prompt_cache_retention": "24h",
    "safety_identifier": "id",
    "user": "ann",
}


def test_every_openai_field_is_in_one_group():
    honoured, neutral, ignored = set(ChatBody.model_fields), set(ChatBody.neutral), set(ChatBody.ignored)
    assert honoured == SAMPLED.keys() | OTHERWISE_HONOURED
    assert neutral == REFUSED.keys()
    assert ignored == IGNORED.keys()
    assert len(honoured) + len(neutral) + len(ignored) == len(honoured | neutral | ignored)
    assert honoured | neutral | ignored == FIELDS | EXTENSIONS | OF_RIVALS.keys() | OF_RIVALS_CHAT.keys()


@pytest.mark.parametrize(
    ("wire", "params"),
    [
        (ChatMessage, ChatCompletionDeveloperMessageParam),
        (ChatMessage, ChatCompletionSystemMessageParam),
        (ChatMessage, ChatCompletionUserMessageParam),
        (ChatMessage, ChatCompletionAssistantMessageParam),
        (Part, ChatCompletionContentPartTextParam),
        (Part, ChatCompletionContentPartImageParam),
        (ImageUrl, ImageURL),
        (StreamOptions, ChatCompletionStreamOptionsParam),
        (ChatMessage, ChatCompletionToolMessageParam),
        (schema.Call, ChatCompletionMessageFunctionToolCallParam),
        (schema.CalledFunction, Function),
        (schema.FunctionTool, ChatCompletionFunctionToolParam),
        (schema.Function, FunctionDefinition),
        (schema.JsonSchema, JSONSchema),
    ],
)
def test_inner_fields_are_known_too(wire: type[Wire], params: type):
    assert set(typing.get_type_hints(params)) <= {*wire.honoured(), *wire.neutral, *wire.ignored}


@pytest.mark.parametrize("field", SAMPLED)
def test_honoured(served: Live, echo: Echo, field: str):
    value, expected = SAMPLED[field]
    assert served.chat(**{field: value}).status_code == 200
    assert echo.requests[-1].sampling == Sampling(**expected)
    assert served.chat(**{field: None}).status_code == 200
    assert echo.requests[-1].sampling == Sampling()


@pytest.mark.parametrize("field", REFUSED)
def test_neutral_only(served: Live, echo: Echo, field: str):
    for value in (None, *ChatBody.neutral[field]):
        assert served.chat(**{field: value}).status_code == 200, value
        assert echo.requests[-1].sampling == Sampling()
    error = refused(served, **{field: REFUSED[field]})
    assert (error["param"], error["code"]) == (field, "unsupported_parameter")
    assert error["message"].startswith(f"{field} is ") and f"leave {field} out" in error["message"]


@pytest.mark.parametrize("field", IGNORED)
def test_ignored(served: Live, echo: Echo, field: str):
    assert served.chat().status_code == served.chat(**{field: IGNORED[field]}).status_code == 200
    assert echo.requests[-1] == echo.requests[-2]


def refused(served: Live, content: object = "hi", **fields: object) -> dict[str, typing.Any]:
    """The error of a request that must be a 400."""
    reply = served.chat(content, **fields)
    return refusal(reply)


def image(url: object) -> list[dict[str, object]]:
    return [{"type": "image_url", "image_url": {"url": url}}]


CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
IMAGE_AT = "messages.0.content.0.image_url.url"


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"temprature": 1}, "temprature", "temprature is an unknown field. Hint: did you mean 'temperature'?"),
        ({"zzzzzz": 1}, "zzzzzz", "there are: model, max_tokens"),
        ({"repetition_penalty": 0}, "repetition_penalty", "between 0.01 and 100"),
        ({"frequency_penalty": 2.5}, "frequency_penalty", "between -2 and 2"),
        ({"presence_penalty": "much"}, "presence_penalty", "valid number"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "logit_bias has the key 'a'"),
        ({"logit_bias": {"5": 1, "b": 1, "c": 1}}, "logit_bias", "logit_bias has the key 'b', 'c'. Hint"),
        ({"logit_bias": dict.fromkeys("abcdefghi", 1)}, "logit_bias", "'g', 'h' and more. Hint"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "between -100 and 100"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 129}, "n", "less than or equal to 128"),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs is not true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"response_format": "json"}, "response_format", "it must be a JSON object"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "it should be 'text', 'json_object' or 'json_schema'"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "is missing"),
        ({"response_format": {"type": "text", "json_schema": {"name": "x"}}}, "response_format.json_schema", "of type 'text'"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "response_format.json_schema.name", "missing"),
        ({"response_format": {"type": "text", "schema": {}}}, "response_format.schema", "put it into json_schema"),
        ({"response_format": {"type": "json_object", "schema": 5}}, "response_format.schema", "it should be an object"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "is given, and guided_regex too"),
        ({"guided_json": "{"}, "guided_json", "guided_json is not JSON"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "holds regex and choice"),
        ({"structured_outputs": {}}, "structured_outputs", "holds nothing"),
        ({"structured_outputs": {"whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern", "does not support"),
        ({"tools": [{"type": "custom"}]}, "tools.0.type", "it should be 'function'"),
        ({"tools": [{"type": "function"}]}, "tools.0.function", "is missing"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", "'a b'"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}] * 2}, "tools", "two tools have the same name"),
        ({"tools": [{"type": "function", "function": {"name": "f", "args": {}}}]}, "tools.0.function.args", "unknown field"),
        ({"tool_choice": "always"}, "tool_choice", 'tool_choice is "always". Hint: it must be'),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"tool_choice": {"type": "auto"}}, "tool_choice", "it must be"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function", "is missing"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice", "names 'g', which is none of the tools"),
        ({"tool_choice": {"type": "custom", "custom": {"name": "g"}}}, "tool_choice.custom", "unknown field"),
        ({"temperature": "hot"}, "temperature", 'temperature is "hot"; it should be a valid number'),
        ({"temperature": True}, "temperature", "temperature is true; it should be a valid number"),
        ({"temperature": 3}, "temperature", "temperature is 3.0; it must be a number between 0 and 2"),
        ({"top_p": -0.1}, "top_p", "between 0 and 1"),
        ({"min_p": 1.5}, "min_p", "between 0 and 1"),
        ({"top_k": -1}, "top_k", "top_k is -1"),
        ({"top_k": 1.5}, "top_k", "valid integer"),
        ({"seed": 1 << 70}, "seed", "seed is 1180591620717411303424"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens is 0; it should be greater than or equal to 1"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "max_completion_tokens is 0"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "max_tokens is 3 and max_completion_tokens is 4"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "at most 4 items after validation, not 5"),
        ({"stop": [1]}, "stop.0", "valid string"),
        ({"stop": [""]}, "stop", "none empty"),
        ({"stop": 5}, "stop", "stop is 5"),
        ({"stream": "true"}, "stream", "valid boolean"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream is not true"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "did you mean 'include_usage'?"),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats", "only false"),
        ({"stream": True, "stream_options": 1}, "stream_options", "it must be a JSON object"),
        ({"model": None}, "model", "model is null; it should be a valid string"),
        ({"messages": []}, "messages", "messages is []; the list should have at least 1 item"),
        ({"messages": "hi"}, "messages", 'messages is "hi"; it should be a valid array'),
        ({"messages": ["hi"]}, "messages.0", 'messages.0 is "hi"; it must be a JSON object'),
        ({"messages": [{"content": "hi"}]}, "messages.0.role", "messages.0.role is missing"),
        ({"messages": [{"role": "function", "content": "hi"}]}, "messages.0.role", "'user', 'assistant' or 'tool'"),
        ({"messages": [{"role": "tool", "content": "hi"}]}, "messages.0.tool_call_id", "is missing"),
        ({"messages": [{"role": "user", "content": "hi", "tool_call_id": "x"}]}, "messages.0.tool_call_id", "of role 'user'"),
        ({"messages": [{"role": "user", "content": "", "tool_calls": [CALL]}]}, "messages.0.tool_calls", "only the assistant calls"),
        ({"messages": [{"role": "tool", "content": image("data:,"), "tool_call_id": "x"}]}, "messages.0.content", "holds an image"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "is missing"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages.0.content", "is null; it must be a string or a list of parts"),
        ({"messages": [{"role": "user", "contnet": "hi"}]}, "messages.0.contnet", "did you mean 'content'?"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "messages.0.tool_calls.0.id", "is missing"),
        ({"content": 5}, "messages.0.content", "is 5; it must be a string or a list of parts"),
        ({"content": []}, "messages.0.content", "at least 1 item"),
        ({"content": [{"type": "input_audio"}]}, "messages.0.content.0.type", "it should be 'text' or 'image_url'"),
        ({"content": [{"type": "text"}]}, "messages.0.content.0.text", "is missing"),
        ({"content": [{"type": "image_url", "text": "x"}]}, "messages.0.content.0.text", "stands in a part of type 'image_url'"),
        ({"content": [{"type": "image_url", "image_url": "data:,"}]}, "messages.0.content.0.image_url", "it must be a JSON object"),
        ({"content": image("https://example.com/a.png")}, IMAGE_AT, "'https://example.com/a.png' is not a data: URI. Hint: send the image"),
        ({"content": image("file:///etc/passwd")}, IMAGE_AT, "data:image/png;base64"),
        ({"content": image("/etc/passwd")}, IMAGE_AT, "is not a data: URI"),
        ({"content": image(__file__)}, IMAGE_AT, "is not a data: URI"),
        ({"content": image("data:image/png;base64,a*b")}, IMAGE_AT, "not base64"),
        ({"content": image("data:text/plain;base64,aGk=")}, IMAGE_AT, "not an image"),
        ({"content": image(None)}, IMAGE_AT, "valid string"),
    ],
)
def test_mistakes(served: Live, fields: dict[str, typing.Any], param: str, message: str):
    error = refused(served, **fields)
    assert error["param"] == param
    assert message in error["message"]


@pytest.mark.parametrize(
    ("wire", "expected"),
    [
        ("auto", ToolChoice()),
        ("none", ToolChoice(mode="none")),
        ("required", ToolChoice(mode="required")),
        ({"type": "function", "function": {"name": "g"}}, ToolChoice(mode="required", names=("g",))),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "f"}}]}},
            ToolChoice(names=("f",)),
        ),
    ],
)
def test_tool_choices(served: Live, echo: Echo, wire: object, expected: ToolChoice):
    parameters = {"type": "object", "properties": {"x": {"type": "integer"}}}
    full = {"name": "f", "description": "what f does", "parameters": parameters, "strict": True}
    tools = [{"type": "function", "function": full}, {"type": "function", "function": {"name": "g"}}]
    assert served.chat(tools=tools, tool_choice=wire, parallel_tool_calls=False).status_code == 200
    asked = echo.requests[-1]
    assert asked.tools == (Tool(name="f", description="what f does", parameters=parameters, strict=True), Tool(name="g"))
    assert asked.tool_choice == ToolChoice(mode=expected.mode, names=expected.names, parallel=False)
    assert served.chat(tools=tools, tool_choice=wire).status_code == 200
    assert echo.requests[-1].tool_choice == expected


def test_calls_and_results_in_the_history(served: Live, echo: Echo):
    result = {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "42"}]}
    for calling in ({"content": None}, {}, {"content": "let me see"}):
        messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [CALL], **calling}, result]
        assert served.chat(messages=messages).status_code == 200
        _, said, got = echo.requests[-1].messages
        assert (said.text, said.tool_calls) == (calling.get("content") or "", (ToolCall(id="call_1", name="f", arguments="{}"),))
        assert (got.role, got.text, got.tool_call_id) == ("tool", "42", "call_1")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "array"}}}},
            ({"type": "array"}, False),
        ),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "strict": True}}}, ({"type": "object"}, True)),
        ({"response_format": {"type": "json_object", "schema": {"type": "array"}}}, ({"type": "array"}, False)),
        ({"structured_outputs": {"json": {"type": "array"}}}, ({"type": "array"}, True)),
        ({"structured_outputs": {"json": '{"type": "array"}'}, "response_format": {"type": "text"}}, ({"type": "array"}, True)),
    ],
)
def test_schemas(served: Live, echo: Echo, fields: dict[str, typing.Any], expected: tuple[object, bool]):
    assert served.chat(**fields).status_code == 200
    value, strict = expected
    assert echo.requests[-1].sampling.format == Format(kind="json_schema", value=value, strict=strict)


def test_top_logprobs(served: Live, echo: Echo):
    assert served.chat(logprobs=True, top_logprobs=5).status_code == 200
    assert echo.requests[-1].sampling.logprobs == 5


def test_long_values_are_cut(served: Live):
    assert len(refused(served, model=["x" * 5000])["message"]) < 200


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is not JSON"),
        (b"{", "the body is not JSON: EOF while parsing"),
        (b'{"model": "\xff"}', "the body is not JSON"),
        (b"[" * 50_000, "the body is not JSON"),
        (b"[1]", "the body is [1]; it must be a JSON object"),
        (b"{}", "model is missing"),
        (b'{"model": "echo", "temperature": NaN, "messages": [{"role": "user", "content": "hi"}]}', "temperature is nan"),
        (b'{"model": "echo", "messages": [{"role": "user", "content": "\\ud800"}]}', "the body is not JSON"),
    ],
)
def test_bodies_that_are_no_request(served: Live, body: bytes, message: str):
    reply = served.http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json; charset=utf-8"})
    assert reply.status_code == 400
    assert message in reply.json()["error"]["message"]
