"""Tools, calls and results in prompts, against Meta's renderer and guide and against transformers' own template."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_models.datatypes import RawMessage, StopReason, ToolPromptFormat
from llama_models.datatypes import ToolCall as MetaCall
from transformers.models.llama4 import processing_llama4
from transformers.utils.chat_template_utils import _compile_jinja_template

from herd.chat import Fold, Image, Message, Tool, ToolCall
from herd.errors import PromptError, UsageError
from herd.text.calls import CallReader
from herd.text.images import Tiling
from herd.text.prompt import render, tool_format_of
from herd.text.tokenizer import byte_tokenizer, decode
from tests.text.test_prompt import chatml_bytes, picture

BYTES = byte_tokenizer()
WEATHER = Tool(
    name="get_weather",
    description="Get weather info for places",
    parameters={
        "type": "dict",
        "required": ["city"],
        "properties": {
            "city": {"type": "string", "description": "The name of the city to get the weather for"},
            "metric": {
                "type": "string",
                "description": "The metric for weather. Options are: celsius, fahrenheit",
                "default": "celsius",
            },
        },
    },
)
DEEP = '{"a": ' + "[" * 500 + "]" * 500 + "}"


def says(role: str, text: str = "", calls: tuple[ToolCall, ...] = (), answers: str | None = None) -> Message:
    return Message(role=role, content=(text,) if text else (), tool_calls=calls, tool_call_id=answers)  # type: ignore[arg-type]


def call(call_id: str, name: str = "get_weather", **arguments: Any) -> ToolCall:
    return ToolCall(id=call_id, name=name, arguments=json.dumps(arguments))


def text_of(messages: list[Message], tokenizer: Any = BYTES, **options: Any) -> str:
    return decode(tokenizer, render(messages, tokenizer, **options).tokens, specials=True)


def test_the_example_of_metas_guide() -> None:
    """Word for word but for the middle of the guide."""
    prompt = text_of([says("user", "What is the weather in SF and Seattle?")], tools=[WEATHER])
    begin, rest = prompt.split("Here is a list of functions in JSON format that you can invoke.\n\n")
    assert begin.startswith(
        "<|begin_of_text|><|header_start|>system<|header_end|>\n\nYou are a helpful assistant and an expert in function composition. "
        "You can answer general questions using your internal knowledge OR invoke functions when necessary. Follow these strict guidelines:"
        "\n\n1. FUNCTION CALLS:\n- ONLY use functions that are EXPLICITLY listed in the function list below\n"
    )
    assert begin.endswith("- Don't repeat tool response verbatim\n- Don't add supplementary information\n\n\n")
    assert rest == (
        """[
    {
        "name": "get_weather",
        "description": "Get weather info for places",
        "parameters": {
            "type": "dict",
            "required": [
                "city"
            ],
            "properties": {
                "city": {
                    "type": "string",
                    "description": "The name of the city to get the weather for"
                },
                "metric": {
                    "type": "string",
                    "description": "The metric for weather. Options are: celsius, fahrenheit",
                    "default": "celsius"
                }
            }
        }
    }
]

You can answer general questions or invoke tools when necessary.
In addition to tool calls, you should also augment your responses by using the tool outputs.<|eot|><|header_start|>user<|header_end|>

What is the weather in SF and Seattle?<|eot|><|header_start|>assistant<|header_end|>

"""
    )


def test_a_system_message_of_ones_own_follows_the_tools() -> None:
    prompt = text_of([says("system", "Be brief."), says("user", "hi")], tools=[WEATHER])
    assert "by using the tool outputs.\nBe brief.<|eot|><|header_start|>user" in prompt and prompt.count("system<|header_end|>") == 1


def test_history_as_meta_renders_it(llama4, meta_format) -> None:  # type: ignore[no-untyped-def]
    ours = [
        says("user", "weather?"),
        says("assistant", "Let me see. ", (call("a", city="Zürich", days=3, exact=True, at=1.5, who=None),)),
        says("tool", '{"celsius": 12}', answers="a"),
        says("assistant", "It is 12."),
        says("user", "thanks"),
    ]
    given = {"city": "Zürich", "days": 3, "exact": True, "at": 1.5, "who": None}
    made = MetaCall(call_id="a", tool_name="get_weather", arguments=given, arguments_json=json.dumps(given))
    theirs = [
        RawMessage(role="user", content="weather?"),
        RawMessage(role="assistant", content="Let me see. ", tool_calls=[made], stop_reason=StopReason.end_of_turn),
        RawMessage(role="tool", content='{"celsius": 12}'),
        RawMessage(role="assistant", content="It is 12.", stop_reason=StopReason.end_of_turn),
        RawMessage(role="user", content="thanks"),
    ]
    assert render(ours, llama4).tokens == meta_format.encode_dialog_prompt(theirs, ToolPromptFormat.python_list).tokens


TEMPLATE = _compile_jinja_template(processing_llama4.chat_template)
CALLS = (call("a", city="Zürich's", n=[1, {"x": None}]), call("b", city='B"'))
DIALOGS = [
    [says("user", " weather? ")],
    [says("system", " Be brief. "), says("user", "weather?")],
    [says("user", "weather?"), says("assistant", "Let me see", CALLS), says("tool", '12 "C"', answers="a"), says("tool", "é", answers="b")],
    [
        says("user", "weather?"),
        says("assistant", "", CALLS[:1]),
        says("tool", "12", answers="a"),
        says("assistant", "12"),
        says("user", "?"),
    ],
]


@pytest.mark.parametrize("dialog", DIALOGS)
@pytest.mark.parametrize("tools", [[], [WEATHER, Tool(name="now", description="The <time>", parameters={"type": "object"})]])
def test_json_form_as_transformers_template(dialog: list[Message], tools: list[Tool]) -> None:
    dicts: list[dict[str, Any]] = []
    for message in dialog:
        dicts.append({"role": message.role, "content": message.text})
        if message.tool_calls:
            functions = [{"name": made.name, "arguments": json.loads(made.arguments)} for made in message.tool_calls]
            dicts[-1]["tool_calls"] = [{"function": function} for function in functions]
    listed = [
        {"type": "function", "function": {"name": tool.name, "description": tool.description, "parameters": tool.parameters}}
        for tool in tools
    ]
    if dialog[0].role == "system" and not tools:
        dicts[0]["content"] = dialog[0].text  # the template trims it even where there are no tools; we keep what was written
        assert text_of(dialog, tool_format="json").replace(" Be brief. ", "Be brief.") == TEMPLATE.render(
            messages=dicts, bos_token="<|begin_of_text|>", add_generation_prompt=True
        )
        return
    want = TEMPLATE.render(messages=dicts, tools=listed or None, bos_token="<|begin_of_text|>", add_generation_prompt=True)
    assert text_of(dialog, tool_format="json", tools=tools) == want


def test_smollm2() -> None:
    tokenizer = chatml_bytes()
    dialog = [says("user", "weather?"), says("assistant", "", CALLS[:1]), says("tool", "12", answers="a")]
    text = text_of(dialog, tokenizer, chat_format="chatml", tools=[Tool(name="now")])
    assert text.startswith("<|im_start|>system\nYou are an expert in composing functions.")
    assert '<tools>[{"name": "now"}]</tools>' in text
    assert text.endswith(
        "<|im_start|>user\nweather?<|im_end|>\n<|im_start|>assistant\n"
        '<tool_call>[\n{"name": "get_weather", "arguments": {"city": "Zürich\'s", "n": [1, {"x": null}]}}\n]</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n12\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60)
@given(
    form=st.sampled_from(["pythonic", "json", "tags"]),
    made=st.lists(st.dictionaries(st.from_regex(r"[a-z]{1,5}", fullmatch=True), VALUES, max_size=3), min_size=1, max_size=3),
)
def test_calls_in_the_history_are_read_as_they_were(form: str, made: list[dict[str, Any]]) -> None:
    """What the model sees of its own calls is what the reader would take for these calls."""
    calls = tuple(call(str(i), **arguments) for i, arguments in enumerate(made))
    tokenizer, chat_format = (chatml_bytes(), "chatml") if form == "tags" else (BYTES, "llama4")
    prompt = render([says("user", "x"), says("assistant", "", calls)], tokenizer, chat_format=chat_format, tool_format=form, reply=False)
    written = decode(tokenizer, [token for token, loss in zip(prompt.tokens, prompt.loss_mask, strict=True) if loss])
    found = Fold(CallReader(["get_weather"]).push(written)).message
    assert found.text == "" and [json.loads(c.arguments) for c in found.tool_calls] == made
    assert len({c.id for c in found.tool_calls}) == len(made)


def test_results_come_in_the_order_of_the_calls() -> None:
    calls = (call("a", city="A"), call("b", city="B"))
    head = [says("user", "x"), says("assistant", "", calls)]
    straight = render([*head, says("tool", "1", answers="a"), says("tool", "2", answers="b")], BYTES)
    assert render([*head, says("tool", "2", answers="b"), says("tool", "1", answers="a")], BYTES).tokens == straight.tokens
    assert render([*head, says("tool", "1"), says("tool", "2")], BYTES).tokens == straight.tokens


def test_tools_go_before_an_image() -> None:
    image = Image(data=picture(8, 8))
    prompt = render([Message(role="user", content=(image, "what?"))], BYTES, tools=[WEATHER], tool_format="json", tiling=Tiling())
    text = decode(BYTES, prompt.tokens, specials=True)
    assert text.index("Given the following functions") < text.index("<|image_start|>") < text.index("what?")


@pytest.mark.parametrize(
    ("dialog", "options", "error", "message"),
    [
        ([says("user", "x"), says("tool", "1")], {}, PromptError, "the result of no call"),
        ([says("assistant", "", (call("a"),)), says("tool", "1", answers="b")], {}, PromptError, "'b', which waits for none"),
        ([says("assistant", "", (call("a"),)), *[says("tool", "1", answers="a")] * 2], {}, PromptError, "'a', which waits for none"),
        ([says("user", "x", (call("a"),))], {}, PromptError, "a message of the user holds calls"),
        ([says("user", "x", answers="a")], {}, PromptError, "a message of the user holds the result"),
        ([says("assistant", "", (ToolCall(id="a", name="f", arguments='{"x'),))], {}, PromptError, "no JSON object"),
        ([says("assistant", "", (ToolCall(id="a", name="f", arguments="[1]"),))], {}, PromptError, "no JSON object"),
        ([says("assistant", "", (ToolCall(id="a", name="f", arguments="[" * 10_000),))], {}, PromptError, "no JSON object"),
        ([says("assistant", "", (ToolCall(id="a", name="f", arguments=DEEP),))], {}, PromptError, "nested deeper than 100"),
        ([says("system", "x")], {"tools": [WEATHER], "tool_format": "json"}, PromptError, "no user message"),
        ([says("user", "x")], {"tool_format": "tags"}, UsageError, "no tool format 'tags'"),
    ],
)
def test_what_cannot_be_rendered(dialog: list[Message], options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        render(dialog, BYTES, **options)


@pytest.mark.parametrize("name", ["", "a b", "x" * 65, "é", "a.b"])
def test_names_that_no_tool_may_have(name: str) -> None:
    with pytest.raises(UsageError, match="a tool is called"):
        Tool(name=name)


def test_the_usual_forms() -> None:
    assert (tool_format_of("llama4"), tool_format_of("chatml"), tool_format_of("llama4", "json")) == ("pythonic", "tags", "json")
