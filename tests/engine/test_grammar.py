"""Replies that must have a form, and calls of tools, in a whole engine: with a tiny model that says anything, and one that is told what."""

import asyncio
import json
import re
from collections import Counter
from typing import Any

import jsonschema
import pytest
import torch

import herd
from herd.chat import ChatRequest, Done, Fold, Format, Message, Sampling, Text, Tool, ToolCallDelta, ToolCallEnd, ToolCallStart, ToolChoice
from herd.engine.grammar import Grammar, Grammars
from herd.engine.local import Local, Model
from herd.errors import HerdError, UsageError
from herd.text.tokenizer import Tokenizer, byte_tokenizer
from tests.engine.made import GREEDY, make_engine, plain_prompt
from tests.text.conftest import donor, llama4  # noqa: F401

from .scripted import EOT, say

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", None, 1.5]}, "maxItems": 3},
        "ok": {"type": ["boolean", "null"]},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
WEATHER = Tool(
    name="get_weather",
    parameters={
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 6},
            "exact": {"type": "boolean"},
            "days": {"type": "array", "items": {"type": "integer", "minimum": -9, "maximum": 9}, "maxItems": 2},
            "where": {"$ref": "#/$defs/where"},
        },
        "required": ["city", "days"],
        "$defs": {"where": {"type": "object", "properties": {"x": {"type": "null"}}, "required": ["x"], "additionalProperties": False}},
    },
)
NOW = Tool(name="get-now", description="The time")
TOOLS = (WEATHER, NOW)
FORMATS = [
    (Format(kind="json_schema", value=SCHEMA), lambda text: jsonschema.validate(json.loads(text), SCHEMA) is None),
    (Format(kind="regex", value=r"[a-c]{2,4}/\d+(é|\.)"), lambda text: re.fullmatch(r"[a-c]{2,4}/[0-9]+(é|\.)", text)),
    (Format(kind="choice", value=("yes", "yes, but", "é\n")), lambda text: text in ("yes", "yes, but", "é\n")),
    (
        Format(kind="lark", value='start: "(" start ")" | "x"'),
        lambda text: re.fullmatch(r"\(*x\)*", text) and text.count("(") == text.count(")"),
    ),
    (Format(kind="gbnf", value='root ::= "a" b+\nb ::= [0-3] | "-"'), lambda text: re.fullmatch(r"a[0-3-]+", text)),
]


@pytest.mark.parametrize(("form", "is_right"), FORMATS, ids=[form.kind for form, _ in FORMATS])
def test_replies_have_their_form(tiny: Model, form: Format, is_right: Any) -> None:
    """However wild the draws; and the rest of the reply is what the stop token says."""
    replies = [tiny.generate("x", temperature=1.5, top_p=1.0, seed=seed, max_tokens=400, format=form) for seed in range(12)]
    for reply in replies:
        assert is_right(reply.text), reply.text
        assert reply.done and reply.done.reason == "stop"
    assert len({reply.text for reply in replies}) > 1


def test_any_json_object(tiny: Model) -> None:
    ended = 0
    for seed in range(3):
        reply = tiny.generate("x", temperature=1.5, top_p=1.0, seed=seed, max_tokens=250, format=Format(kind="json_object"))
        if reply.whole.done and reply.done and reply.done.reason == "stop":
            ended += 1
            assert isinstance(json.loads(reply.text), dict)
    assert ended


def test_the_form_holds_where_the_models_stop_tokens_are_ignored(tiny: Model) -> None:
    reply = tiny.generate("x", temperature=1.5, seed=1, max_tokens=100, ignore_eos=True, format=Format(kind="choice", value=("a", "ab")))
    assert reply.text in ("a", "ab")


@pytest.mark.parametrize("form", ["pythonic", "json"])
@pytest.mark.parametrize("choice", [ToolChoice(mode="required"), ToolChoice(mode="required", names=("get_weather",), parallel=False)])
def test_calls_that_are_required_come_and_fit_their_schema(tiny: Model, form: str, choice: ToolChoice) -> None:
    engine = make_engine(tiny, tool_format=form, step_tokens=64)  # type: ignore[arg-type]
    events: dict[int, list[Any]] = {}
    for seed in range(8):
        sampling = Sampling(temperature=1.5, top_p=1.0, seed=seed, max_tokens=600)
        events[seed] = []
        prompt = tiny.prompt(ChatRequest(model="tiny", messages=(Message(role="user", content=("x",)),)))
        engine.scheduler.add(engine.sequence(prompt, sampling, events[seed].append, tools=TOOLS, tool_choice=choice))
    while not engine.scheduler.is_idle:
        for sequence, event in engine.step():
            sequence.emit(event)
    for seed in events:
        fold = Fold(events[seed])
        assert fold.message.text == "" and fold.done
        if fold.done.reason == "length":
            continue
        assert fold.done.reason == "tool_calls" and fold.message.tool_calls
        assert choice.parallel or len(fold.message.tool_calls) == 1
        for call in fold.message.tool_calls:
            assert not choice.names or call.name in choice.names
            if call.name == "get_weather":
                jsonschema.validate(json.loads(call.arguments), WEATHER.parameters)
            else:
                assert call.arguments == "{}"
    assert any(fold.done and fold.done.reason == "tool_calls" for fold in map(Fold, events.values()))


def test_a_call_is_streamed_as_it_is_written(tiny: Model) -> None:
    events, fold = say(make_engine(tiny), 'So: [get_weather(city="Paris", days=[1, 2]), get-now()] ok', TOOLS)
    assert fold.message.text == "So:  ok"
    assert [(call.name, call.arguments) for call in fold.message.tool_calls] == [
        ("get_weather", '{"city": "Paris", "days": [1, 2]}'),
        ("get-now", "{}"),
    ]
    assert fold.done and fold.done.reason == "tool_calls"
    kinds = [type(event) for event in events]
    assert kinds.index(ToolCallStart) < kinds.index(ToolCallEnd) < kinds.index(Done)
    assert len([event for event in events if isinstance(event, ToolCallDelta)]) > 15


def test_special_tokens_may_stand_around_calls(tiny: Model) -> None:
    start, end = (byte_tokenizer().specials[f"<|python_{name}|>"] for name in ("start", "end"))
    _, fold = say(make_engine(tiny), [start, *b"So", end, *b"[get-now()]", end, EOT], TOOLS)
    assert fold.message.text == "So" and len(fold.message.tool_calls) == 1


def test_an_open_call_is_held_to_its_schema(tiny: Model) -> None:
    """The script breaks the schema; the model has to find its way to a call all the same."""
    _, fold = say(make_engine(tiny), "[get_weather(town=1)]", TOOLS, max_tokens=60)
    start = '[get_weather(city="'
    text = bytes(token for token in fold.done.tokens if token < 256).decode(errors="replace") if fold.done else ""
    assert text.startswith(start)


def test_other_forms_are_read_too_and_held_back(tiny: Model) -> None:
    written = '{"name": "get_weather", "parameters": {"city": "x", "days": []}}'
    events, fold = say(make_engine(tiny), written, TOOLS)
    assert [call.arguments for call in fold.message.tool_calls] == ['{"city": "x", "days": []}']
    assert [event for event in events if isinstance(event, Text)] == []
    _, fold = say(make_engine(tiny), '{"name": "get_weather", "nope": 1}', TOOLS)
    assert fold.message.text == '{"name": "get_weather", "nope": 1}' and fold.done and fold.done.reason == "stop"


def test_a_call_that_is_cut_off_ends_by_length(tiny: Model) -> None:
    events, fold = say(make_engine(tiny), '[get_weather(city="Paris")]', TOOLS, max_tokens=22)
    assert fold.done and fold.done.reason == "length"
    assert fold.message.tool_calls[0].arguments == '{"city": "Par'
    assert not any(isinstance(event, ToolCallEnd) for event in events)


@pytest.mark.parametrize("form", ["pythonic", "json"])
def test_a_stop_string_inside_a_required_call_leaves_no_piece_of_its_mark(tiny: Model, form: str) -> None:
    stop = {"pythonic": "_weather", "json": "name"}[form]
    sampling = {"max_tokens": 99, "stop": (stop,)}
    model = make_engine(tiny, tool_format=form)
    _, fold = say(model, "x", TOOLS, choice=ToolChoice(mode="required", names=("get_weather",)), **sampling)
    assert fold.done and (fold.done.reason, fold.done.stop) == ("stop", stop)
    assert not fold.message.content and not fold.message.tool_calls


def test_choice_none_and_names(tiny: Model) -> None:
    for choice in (ToolChoice(mode="none"), ToolChoice(names=("get_weather",))):
        _, fold = say(make_engine(tiny), "[get-now()]", TOOLS, choice)
        assert fold.message.text == "[get-now()]" and not fold.message.tool_calls


def test_one_call_where_parallel_ones_are_not_wanted(tiny: Model) -> None:
    _, fold = say(make_engine(tiny), "[get-now(), get-now()]", TOOLS, ToolChoice(parallel=False))
    assert len(fold.message.tool_calls) == 1 and fold.done and fold.done.reason == "tool_calls"


def test_a_format_and_tools(tiny: Model) -> None:
    """The text has the form, or there are calls and no text."""
    form = Format(kind="json_schema", value={"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": False})
    _, fold = say(make_engine(tiny), '{"a": 12}', TOOLS, format=form)
    assert fold.message.text == '{"a": 12}' and fold.done and fold.done.reason == "stop"
    _, fold = say(make_engine(tiny), "[get-now()]", TOOLS, format=form)
    assert [call.name for call in fold.message.tool_calls] == ["get-now"]


@pytest.mark.parametrize("text", ['{"name": "ab", "age": 7, "ok": null}', '{"name": "ababababababab'])
def test_what_a_grammar_forces_is_tested_in_one_step(tiny: Model, text: str) -> None:
    """The same tokens as without drafts, in fewer steps."""
    form = Format(kind="json_schema", value=SCHEMA)
    with_drafts, without = make_engine(tiny), make_engine(tiny, draft_tokens=0)
    for temperature in (0, 1.0):
        replies = [say(engine, text, format=form, temperature=temperature, seed=3, max_tokens=50)[1] for engine in (with_drafts, without)]
        assert replies[0].message.text == replies[1].message.text
    assert with_drafts.stats().num_steps < without.stats().num_steps * 0.8


def test_guesses_that_the_grammar_allows_are_tested(tiny: Model) -> None:
    engine = make_engine(tiny)
    _, fold = say(engine, "abcab" * 12, format=Format(kind="regex", value="[abc]+"))
    assert fold.message.text == "abcab" * 12
    assert engine.stats().accepted_tokens > 20


def test_seeded_replies_are_the_same_in_any_company(tiny: Model) -> None:
    def sampling(seed: int) -> Sampling:
        form = Format(kind="json_schema", value=SCHEMA) if seed % 2 else None
        fields: dict[str, Any] = {"presence_penalty": 1.0, "frequency_penalty": 0.3, "repetition_penalty": 1.2, "logit_bias": {97: 3.0}}
        return Sampling(temperature=1.2, top_p=1.0, seed=seed, max_tokens=30, format=form, logprobs=2, **fields)

    alone = {seed: tiny.generate(f"hello {seed}", sampling(seed)).whole for seed in range(6)}
    together = {seed: tiny.generate(f"hello {seed}", sampling(seed)) for seed in range(6)}
    for seed, reply in together.items():
        assert reply.whole.message == alone[seed].message
        drawn = [(one.token, round(one.logprob, 4)) for one in reply.whole.drawn]
        assert drawn == [(one.token, round(one.logprob, 4)) for one in alone[seed].drawn]


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "object", "properties": {"a": {"not": {"type": "string"}}}}, "not"),
        ({"if": {}, "then": {}}, "if, then"),
        ({"type": "string", "format": "colour"}, "format"),
        ({"type": "string", "pattern": "(?=a)b"}, "pattern"),
        ({"oneOf": [{"type": "string"}, {"minLength": 3}]}, "oneOf"),
        ({"$ref": "#/nowhere"}, r"\$ref"),
        ({"enum": [(1 << 53) + 1]}, "enum"),
        ({"type": "strin"}, "type"),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_its_name(tiny: Model, schema: dict[str, Any], keyword: str) -> None:
    with pytest.raises(UsageError, match=keyword) as caught:
        tiny.generate("x", format=Format(kind="json_schema", value=schema))
    assert caught.value.param == "response_format"
    strict = Tool(name="f", parameters={"type": "object", "properties": {"a": schema}}, strict=True)
    with pytest.raises(UsageError, match=keyword) as caught:
        make_engine(tiny).sequence(plain_prompt([1]), GREEDY, print, tools=(strict,))
    assert caught.value.param == "tools"


ODD: dict[str, Any] = {
    "a": {"type": "string", "pattern": "(?=a)b", "maxLength": 2},
    "b": {"$ref": "https://example.org/x"},
    "c": {"type": "integer", "minimum": 1, "maximum": 3},
    "d": {"oneOf": [{"type": "boolean"}, {"enum": [True]}]},
}


@pytest.mark.parametrize("form", ["pythonic", "json"])
@pytest.mark.parametrize("kept", ["acd", "abcd"])
def test_of_a_tool_that_is_not_strict_all_is_enforced_that_can_be(tiny: Model, form: str, kept: str) -> None:
    tool = Tool(name="f", parameters={"type": "object", "properties": {key: ODD[key] for key in kept}, "required": ["c"]})
    engine = make_engine(tiny, tool_format=form)  # type: ignore[arg-type]
    ended = 0
    for seed in range(6):
        sampling = {"temperature": 1.5, "top_p": 1.0, "seed": seed, "max_tokens": 400, "logit_bias": {34: 3.0, 125: 3.0, 93: 3.0}}
        _, fold = say(engine, list(range(256)), (tool,), ToolChoice(mode="required", parallel=False), **sampling)
        if fold.done and fold.done.reason == "tool_calls":
            ended += 1
            assert json.loads(fold.message.tool_calls[0].arguments)["c"] in (1, 2, 3)
    assert ended


@pytest.mark.parametrize("parameters", [{"properties": []}, {"required": "a"}, {"required": [1]}, {"properties": {"a": {"enum": {1, 2}}}}])
def test_parameters_that_are_no_schema(tiny: Model, parameters: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="no JSON") as caught:
        make_engine(tiny).sequence(plain_prompt([1]), GREEDY, print, tools=(Tool(name="f", parameters=parameters),))
    assert caught.value.param == "tools"


def test_a_tool_that_is_not_strict_is_held_to_what_can_be_enforced(tiny: Model) -> None:
    loose = Tool(name="f", parameters={"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True, "maxItems": 1}}})
    sampling = {"temperature": 1.5, "top_p": 1.0, "seed": 2, "max_tokens": 300}
    engine = make_engine(tiny)
    _, fold = say(engine, [0], (loose,), ToolChoice(mode="required"), **sampling)
    assert fold.done and [call.name for call in fold.message.tool_calls] and "[f(" in bytes(fold.done.tokens).decode()


@pytest.mark.parametrize(
    "form", [Format(kind="regex", value="(("), Format(kind="lark", value="start: nope"), Format(kind="gbnf", value="root :=")]
)
def test_broken_grammars_are_refused(tiny: Model, form: Format) -> None:
    with pytest.raises(UsageError) as caught:
        tiny.generate("x", format=form)
    assert caught.value.param == "response_format"


@pytest.mark.parametrize("form", [Format(kind="regex", value="a" * 100_000), Format(kind="choice", value=("b", "a" * 100_000))])
def test_what_is_long_is_refused_at_once(tiny: Model, form: Format) -> None:
    with pytest.raises(UsageError, match="has 100,000 characters; 16,384 is the limit"):
        tiny.generate("x", format=form)


def test_a_grammar_that_the_vocabulary_cannot_write_ends_its_reply_only(tiny: Model) -> None:
    class Poor:
        specials, vocab_size, pre = byte_tokenizer().specials, 271, "default"

        @staticmethod
        def encode(text: str) -> list[int]:
            return byte_tokenizer().encode(text.replace("b", ""))

        @staticmethod
        def token_bytes(token: int) -> bytes:
            return b"" if token == ord("b") else byte_tokenizer().token_bytes(token)

    grammar = Grammars(Poor(), 271, [EOT]).compile(json.dumps({"grammars": [{"lark_grammar": 'start: "ab"'}]}), "response_format")  # type: ignore[arg-type]
    grammar.read(ord("a"))
    with pytest.raises(HerdError, match="no token"):
        grammar.mask(torch.zeros(271))


def walk(grammar: Grammar, tokenizer: Tokenizer, num_tokens: int, seed: int) -> str:
    """A text of tokens drawn at random from those that may come."""
    generator, out = torch.Generator().manual_seed(seed), b""
    for _ in range(600):
        logits = torch.randn(num_tokens, generator=generator)
        grammar.mask(logits)
        token = int(logits.argmax())
        grammar.read(token)
        out += tokenizer.token_bytes(token)
        if grammar.is_finished:
            return out.decode()
    pytest.fail("it does not end")


FORCED = [
    json.dumps({"json_schema": {**SCHEMA, "required": ["name", "age", "tags"], "x-guidance": {"whitespace_flexible": False}}}),
    json.dumps({"json_schema": {"const": "hello there, w\u00f6rld \u20ac \U0001f600 0123456 " * 40}}),
    json.dumps({"lark_grammar": 'start: "one two" (" three" | " thirty one")* /(ab){50}/ "." x?\nx: /hello (world|word)s? and more/'}),
]


class Spied:
    """A matcher, and what was asked of it."""

    def __init__(self, matcher: Any) -> None:
        self.matcher, self.asked = matcher, Counter[str]()

    def __getattr__(self, name: str) -> Any:
        self.asked[name] += 1
        return getattr(self.matcher, name)


@pytest.mark.parametrize("grammar", FORCED, ids=["schema", "const", "lark"])
@pytest.mark.parametrize("vocabulary", ["bytes", "llama4"])
def test_what_is_forced_is_taken_at_its_word(llama4: Any, grammar: str, vocabulary: str) -> None:  # noqa: F811
    """Masks are llguidance's own at every step, also where none was asked for since the token was known."""
    tokenizer, count, stops = (llama4, 202_048, [200_001]) if vocabulary == "llama4" else (byte_tokenizer(), 271, [EOT])
    grammars, generator = Grammars(tokenizer, count, stops), torch.Generator().manual_seed(1)
    text = json.dumps({"grammars": [json.loads(grammar)]})
    bits, places = torch.zeros(-(-count // 32), dtype=torch.int32), torch.arange(count)
    for with_drafts in (False, True):
        own, raw = grammars.compile(text, ""), grammars.compile(text, "")._matcher
        own._matcher = spied = Spied(own._matcher)  # type: ignore[assignment]
        num_tokens = 0
        while not own.is_finished and num_tokens < 60:
            if with_drafts:
                own.drafts([], 8)
            logits = torch.randn(count, generator=generator)
            raw.unsafe_compute_mask_ptr(bits.data_ptr(), bits.nbytes)
            own.mask(logits)
            assert torch.equal(logits > -torch.inf, bits[places // 32] >> (places % 32) & 1 == 1)
            token = int(logits.argmax())
            own.read(token)
            raw.consume_token(token)
            num_tokens += 1
        assert spied.asked["unsafe_compute_mask_ptr"] < num_tokens


def test_a_long_literal_costs_once(llama4: Any) -> None:  # noqa: F811
    """0.1 s and not 0.04 at every token."""
    text = json.dumps({"grammars": [{"json_schema": {"const": "ab" * 50_000}}]})
    grammar = Grammars(llama4, 202_048, [200_001]).compile(text, "")
    grammar._matcher = spied = Spied(grammar._matcher)  # type: ignore[assignment]
    for _ in range(300):
        grammar.prepare()
        grammar.read(grammar.drafts([], 4)[0])
    assert spied.asked["unsafe_compute_mask_ptr"] == 0 and spied.asked["compute_ff_tokens"] == 1


def test_the_released_vocabulary(llama4: Any) -> None:  # noqa: F811
    grammars = Grammars(llama4, 202_048, [200_001, 200_007, 200_008])
    text = json.dumps({"grammars": [{"json_schema": {**SCHEMA, "x-guidance": {"whitespace_flexible": False}}}]})
    for seed in range(5):
        jsonschema.validate(json.loads(walk(grammars.compile(text, ""), llama4, 202_048, seed)), SCHEMA)


@pytest.mark.weights
def test_the_default_models_vocabulary(donor: Any) -> None:  # noqa: F811
    grammars = Grammars(donor, 49_152, [2])
    text = json.dumps({"grammars": [{"json_schema": {**SCHEMA, "x-guidance": {"whitespace_flexible": False}}}]})
    for seed in range(5):
        jsonschema.validate(json.loads(walk(grammars.compile(text, ""), donor, 49_152, seed)), SCHEMA)


def test_a_conversation_with_a_tool() -> None:
    """By way of the backend: a call, its result, and a reply."""
    tiny = herd.load("tiny", device="cpu", tool_format="json")  # the guide of the other form is longer than the tiny context

    async def turn(messages: tuple[Message, ...], choice: ToolChoice) -> Fold:
        sampling = Sampling(temperature=1.0, seed=1, max_tokens=200)
        request = ChatRequest(model="tiny", messages=messages, sampling=sampling, tools=(NOW,), tool_choice=choice)
        return Fold([event async for event in Local([tiny]).chat(request)])

    messages: tuple[Message, ...] = (Message(role="user", content=("what time is it?",)),)
    first = asyncio.run(turn(messages, ToolChoice(mode="required", parallel=False)))
    assert first.done and first.done.reason == "tool_calls"
    (call,) = first.message.tool_calls
    messages = (*messages, first.message, Message(role="tool", content=("12:00",), tool_call_id=call.id))
    second = asyncio.run(turn(messages, ToolChoice(mode="none")))
    assert second.done and second.done.reason in ("stop", "length") and not second.message.tool_calls
    dicts: list[Any] = [
        {"role": "user", "content": "what time is it?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}],
        },
        {"role": "tool", "content": "12:00", "tool_call_id": call.id},
    ]
    assert tiny.chat(dicts, temperature=1.0, seed=1, max_tokens=200).text == second.message.text
