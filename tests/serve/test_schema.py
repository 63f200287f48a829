"""Every field that OpenAI knows is honoured, refused or on the short list of those without effect; every mistake is named."""

import typing

import pytest
from openai.types.chat import completion_create_params as openai_params
from openai.types.chat.chat_completion_assistant_message_param import ChatCompletionAssistantMessageParam
from openai.types.chat.chat_completion_content_part_image_param import ChatCompletionContentPartImageParam, ImageURL
from openai.types.chat.chat_completion_content_part_text_param import ChatCompletionContentPartTextParam
from openai.types.chat.chat_completion_developer_message_param import ChatCompletionDeveloperMessageParam
from openai.types.chat.chat_completion_stream_options_param import ChatCompletionStreamOptionsParam
from openai.types.chat.chat_completion_system_message_param import ChatCompletionSystemMessageParam
from openai.types.chat.chat_completion_user_message_param import ChatCompletionUserMessageParam

from herd.chat import Sampling
from herd.serve.schema import ChatBody, ChatMessage, ImageUrl, Part, StreamOptions, Wire
from tests.serve.conftest import Live
from tests.serve.echo import Echo

FIELDS = set(typing.get_type_hints(openai_params.CompletionCreateParamsStreaming))

# field: (its value on the wire, what Sampling makes of it)
SAMPLED = {
    "max_completion_tokens": (7, {"max_tokens": 7}),
    "max_tokens": (7, {"max_tokens": 7}),
    "temperature": (0, {"temperature": 0.0}),
    "top_p": (0.5, {"top_p": 0.5}),
    "seed": (-3, {"seed": -3}),
    "stop": ("END", {"stop": ("END",)}),
    "top_k": (40, {"top_k": 40}),
    "min_p": (0.1, {"min_p": 0.1}),
    "ignore_eos": (True, {"ignore_eos": True}),
}
OTHERWISE_HONOURED = {
    "model",
    "messages",
    "stream",
    "stream_options",
    "prompt_cache_key",
}  # tests in test_api.py, test_sse.py, test_river.py

REFUSED = {
    "audio": {"voice": "alloy", "format": "wav"},
    "frequency_penalty": 0.5,
    "function_call": {"name": "f"},
    "functions": [{"name": "f"}],
    "logit_bias": {"5": 1},
    "logprobs": True,
    "modalities": ["text", "audio"],
    "moderation": {"model": "omni-moderation-latest"},
    "n": 2,
    "parallel_tool_calls": "yes",
    "prediction": {"type": "content", "content": "x"},
    "presence_penalty": -1,
    "reasoning_effort": "high",
    "response_format": {"type": "json_object"},
    "service_tier": "flex",
    "store": True,
    "tool_choice": "required",
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "top_logprobs": 3,
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
    assert honoured | neutral | ignored == FIELDS | {"top_k", "min_p", "ignore_eos"}


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
    ],
)
def test_inner_fields_are_known_too(wire: type[Wire], params: type):
    assert set(typing.get_type_hints(params)) <= {*wire.model_fields, *wire.neutral, *wire.ignored}


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
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    return error


def image(url: object) -> list[dict[str, object]]:
    return [{"type": "image_url", "image_url": {"url": url}}]


IMAGE_AT = "messages.0.content.0.image_url.url"


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"temprature": 1}, "temprature", "temprature is an unknown field. Hint: did you mean 'temperature'?"),
        ({"zzzzzz": 1}, "zzzzzz", "there are: model, messages"),
        ({"repetition_penalty": 1.1}, "repetition_penalty", "unknown field"),
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
        ({"stream": True, "stream_options": 1}, "stream_options", "it must be a JSON object"),
        ({"model": None}, "model", "model is null; it should be a valid string"),
        ({"messages": []}, "messages", "messages is []; the list should have at least 1 item"),
        ({"messages": "hi"}, "messages", 'messages is "hi"; it should be a valid array'),
        ({"messages": ["hi"]}, "messages.0", 'messages.0 is "hi"; it must be a JSON object'),
        ({"messages": [{"content": "hi"}]}, "messages.0.role", "messages.0.role is missing"),
        ({"messages": [{"role": "tool", "content": "hi"}]}, "messages.0.role", "it should be 'developer', 'system', 'user' or 'assistant'"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "is missing"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages.0.content", "is null; it must be a string or a list of parts"),
        ({"messages": [{"role": "user", "contnet": "hi"}]}, "messages.0.contnet", "did you mean 'content'?"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "messages.0.tool_calls", "does not support"),
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
