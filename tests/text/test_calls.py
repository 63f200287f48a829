"""Calls in a reply's text: every form, every cut, and an independent reader (Python's own) for the same text."""

import ast
import itertools
import json
import keyword

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from herd.chat import ChatEvent, Fold, Text, ToolCallDelta, ToolCallEnd, ToolCallStart
from herd.text.calls import MOST_CHARS, CallReader
from herd.text.stream import Detokenizer

NAMES = ["get_weather", "add", "get-time"]
ALL = ("pythonic", "json", "tags")

Result = tuple[str, list[tuple[str, str]]]


def events(pieces: list[str], trusted: tuple[str, ...] = (), **options: object) -> list[ChatEvent]:
    numbers = itertools.count()
    reader = CallReader(NAMES, trusted=trusted, new_id=lambda: f"id{next(numbers)}", **options)  # type: ignore[arg-type]
    found = [event for piece in pieces for event in reader.push(piece)]
    return found + reader.finish()


def read(pieces: str | list[str], trusted: tuple[str, ...] = (), **options: object) -> Result:
    """The text and the calls."""
    message = Fold(events([pieces] if isinstance(pieces, str) else pieces, trusted, **options)).message
    return message.text, [(call.name, call.arguments) for call in message.tool_calls]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.from_regex(r"[a-z_][a-z0-9_]{0,5}", fullmatch=True).filter(lambda key: not keyword.iskeyword(key))  # Python is asked
ARGUMENTS = st.dictionaries(KEYS, VALUES, max_size=4)
CALLS = st.lists(st.tuples(st.sampled_from(["get_weather", "add"]), ARGUMENTS), min_size=1, max_size=3)
PLAIN = st.text("ab[]{}<>()=,:;\"'\\ \n", max_size=12) | st.sampled_from(["see: ", "[1, 2]", "[x](y)", '{"a": 1}', "<b>", "[add", "[add("])
CUTS = st.lists(st.integers(0, 400), max_size=12)


def pythonic(calls: list[tuple[str, dict[str, object]]]) -> str:
    written = [f"{name}({', '.join(f'{key}={value!r}' for key, value in given.items())})" for name, given in calls]
    return f"[{', '.join(written)}]"


def as_json(calls: list[tuple[str, dict[str, object]]], key: str = "parameters") -> list[str]:
    return [json.dumps({"name": name, key: given}, ensure_ascii=len(name) == 3) for name, given in calls]


FORMS = {
    "pythonic": pythonic,
    "json": lambda calls: "".join(as_json(calls)),
    "json, semicolons": lambda calls: "; ".join(as_json(calls)),
    "json, list": lambda calls: f"[{', '.join(as_json(calls, 'arguments'))}]",
    "tags": lambda calls: "<tool_call>[\n" + ",\n".join(as_json(calls, "arguments")) + "\n]</tool_call>",
    "tag for each": lambda calls: "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in as_json(calls, "arguments")),
    "function": lambda calls: "".join(f"<function={name}>{json.dumps(given)}</function>" for name, given in calls),
}


def cut(text: str, places: list[int]) -> list[str]:
    ends = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[a:b] for a, b in itertools.pairwise(ends)]


@settings(max_examples=60)
@given(form=st.sampled_from(sorted(FORMS)), calls=CALLS, before=st.sampled_from(["", "Let me see.\n", " \n"]), cuts=CUTS)
def test_every_form_gives_the_calls(form: str, calls: list[tuple[str, dict[str, object]]], before: str, cuts: list[int]) -> None:
    for trusted in ((), ALL):
        text, found = read(cut(before + FORMS[form](calls), cuts), trusted)
        assert text == (before if before.strip() else "")
        assert [name for name, _ in found] == [name for name, _ in calls]
        for (_, arguments), (_, want) in zip(found, calls, strict=True):
            assert json.loads(arguments) == json.loads(json.dumps(want))


@settings(max_examples=50)
@given(
    text=st.lists(PLAIN | CALLS.map(pythonic) | st.sampled_from(sorted(FORMS)).flatmap(lambda f: CALLS.map(FORMS[f])), max_size=4).map(
        "".join
    )
)
@example(text='[add(a="\\u00e9\\ud83d\\ude42", b=\'\\x41\\101\\q\', c="""x"\n""")] [add(a=1e5, b=.5, c=-0, d=1_000, e=0x1)]')
@example(text="[add(a=1), nope(b=2)] [[add()]] <tool_call>[]</tool_call> <tool_call>{")
def test_no_cut_matters(text: str) -> None:
    """In two at every place, and in single characters; with what is trusted too."""
    for trusted in ((), ALL):
        whole = read(text, trusted)
        assert read(list(text), trusted) == whole
        for place in range(1, len(text), 1 + len(text) // 80):
            assert read([text[:place], text[place:]], trusted) == whole
        assert not whole[1] or trusted or all(isinstance(json.loads(arguments), dict) for _, arguments in whole[1])


@settings(max_examples=50)
@given(text=st.lists(PLAIN | CALLS.map(pythonic), max_size=4).map("".join))
def test_what_is_no_call_is_text_to_the_last_character(text: str) -> None:
    content, calls = read(text)
    if not calls:
        assert content == text


@pytest.mark.parametrize("place", range(0, 60, 7))
def test_tokens_of_the_released_tokenizer(llama4, place: int) -> None:  # type: ignore[no-untyped-def]
    """As the engine has it: tokens, special ones among them, by way of the detokenizer."""
    text = 'Höre 🙂: [get_weather(city="São Paulo 🙂\\n", days=[1, -2.5]), add(a={"x": None})]\n'
    marks = [llama4.specials["<|python_start|>"], llama4.specials["<|python_end|>"]]
    encoded = text.encode()
    while encoded[place : place + 1] and encoded[place] & 0xC0 == 0x80:
        place += 1
    tokens = [marks[0], *llama4.encode(encoded[:place].decode()), *llama4.encode(encoded[place:].decode()), marks[1]]
    detokenizer = Detokenizer(llama4)
    pieces = [detokenizer.push(token) for token in tokens] + [detokenizer.finish()]
    assert read(pieces) == read(text)
    assert read(text)[1] == [
        ("get_weather", '{"city": "São Paulo 🙂\\n", "days": [1, -2.5]}'),
        ("add", '{"a": {"x": null}}'),
    ]


@settings(max_examples=50)
@given(calls=CALLS)
def test_python_reads_the_same(calls: list[tuple[str, dict[str, object]]]) -> None:
    text = pythonic(calls)
    nodes = ast.parse(text, mode="eval").body.elts  # type: ignore[attr-defined]
    want = [(node.func.id, {k.arg: ast.literal_eval(k.value) for k in node.keywords}) for node in nodes]
    assert [(name, json.loads(arguments)) for name, arguments in read(text)[1]] == [(name, json.loads(json.dumps(kw))) for name, kw in want]


NO_CALLS = [
    "[nope(x=1)]",
    "[add(1)]",
    "[add(a=1 + 1)]",
    "[add(a=b)]",
    "[add(a=f(1))]",
    "[add(a=(1, 2))]",
    "[add(a=1, a=2)]",
    "[add(a=1]",
    "[add(a=1)",
    "[add(a=007)]",
    "[add(a=r'x')]",
    "[add(a=1), nope()]",
    "[add(**{})]",
    "[add(a={1, 2})]",
    '[add(a="\\ux")]',
    "add(a=1)",
    '{"name": "nope", "parameters": {}}',
    '{"name": "add"}',
    '{"name": "add", "parameters": [1]}',
    '{"name": "add", "parameters": {}, "more": 1}',
    '{"parameters": {}, "name": "add"}',
    '{"name": "add", "parameters": {"a": 1}',
    "<tool_call>add</tool_call>",
    "<function=nope>{}</function>",
    "[add(a=" + "[" * 100 + "]" * 100 + ")]",
    "[]",
    "[" + " " * 300 + "add()]",
]


@pytest.mark.parametrize("text", NO_CALLS, ids=lambda text: text[:30])
def test_what_only_looks_like_a_call_is_text(text: str) -> None:
    assert read(text) == (text, [])
    assert read(f"so: {text} yes") == (f"so: {text} yes", [])
    assert read(f"{text} [add(z=1)]") == (f"{text} ", [("add", '{"z": 1}')])  # and it spoils no call that follows


def test_other_spellings() -> None:
    assert read("[get_time()]") == read("[get-time()]") == ("", [("get-time", "{}")])
    assert read("[ add ( a = 1 , ) , ]") == ("", [("add", '{"a": 1}')])
    assert read("[add(a=true, b=null, c=True)]") == ("", [("add", '{"a": true, "b": null, "c": true}')])
    assert read('{"type": "function", "name": "add", "parameters": {}}') == ("", [("add", "{}")])
    assert read("[add()] [add()];\n[add()]\n") == ("", [("add", "{}")] * 3)
    assert read("<tool_call>[]</tool_call>") == ("", [])
    assert read('<tool_call>{"name": "add", "arguments": {}}') == ("", [("add", "{}")])


def test_a_call_may_begin_inside_what_was_none() -> None:
    assert read("[[add()]]") == ("[]", [("add", "{}")])
    assert read("[{[add()]") == ("[{", [("add", "{}")])
    assert read("[nope([add()]") == ("[nope(", [("add", "{}")])
    assert read("<<function=add>{}</function>") == ("<", [("add", "{}")])
    assert read("[add(a=[add()]") == ("[add(a=[add()]", [])  # it had opened, so it is text as far as it went


def test_text_after_calls_stays() -> None:
    assert read("a [add()] b") == ("a  b", [("add", "{}")])
    assert read("[add()], and so on") == (", and so on", [("add", "{}")])


def test_a_call_that_is_trusted_comes_as_it_is_written() -> None:
    pieces = ["[add(", 'a="x', "y\\", 'n", b', "=1", "2)", "]"]
    assert events(pieces, ALL) == [
        ToolCallStart(index=0, id="id0", name="add"),
        ToolCallDelta(index=0, arguments='{"a": "x'),
        ToolCallDelta(index=0, arguments="y"),
        ToolCallDelta(index=0, arguments='\\n"'),
        ToolCallDelta(index=0, arguments=', "b": '),
        ToolCallDelta(index=0, arguments="12}"),
        ToolCallEnd(index=0),
    ]
    cut_off = events(pieces[:3], ALL)
    assert ToolCallEnd(index=0) not in cut_off and "".join(e.arguments for e in cut_off if isinstance(e, ToolCallDelta)) == '{"a": "xy'
    assert events(pieces[:3]) == [Text(text='[add(a="xy\\')]


def test_what_is_not_trusted_is_held_back_whole_and_not_for_ever() -> None:
    reader = CallReader(NAMES)
    assert reader.push('[add(a="') == []
    assert "".join(e.text for e in reader.push("x" * MOST_CHARS) if isinstance(e, Text)) == '[add(a="' + "x" * (MOST_CHARS - 7) + "x" * 7
    assert reader.num_calls == 0


def test_one_call_where_one_is_allowed() -> None:
    for trusted in ((), ALL):
        reader = CallReader(NAMES, parallel=False, trusted=trusted)
        found = Fold(reader.push("[add(a=1), add(a=2)]") + reader.finish()).message
        assert [call.arguments for call in found.tool_calls] == ['{"a": 1}'] and reader.stopped


def test_every_call_has_an_id_of_its_own() -> None:
    reader = CallReader(NAMES)
    found = Fold(reader.push("[add(), add()]")).message.tool_calls
    assert len({call.id for call in found}) == 2 and all(call.id.startswith("call_") for call in found)


@given(text=PLAIN)
def test_text_is_not_kept_waiting(text: str) -> None:
    """Whatever cannot be the beginning of a call is given out at once."""
    reader = CallReader(NAMES)
    out = "".join(event.text for event in reader.push(text + "." * 300) if isinstance(event, Text))
    assert out.endswith("." * 44)


def test_the_beginning_of_a_required_call_is_no_text() -> None:
    for piece in ("<tool_c", "<tool_call>", '<tool_call>[{"na', "[", " ", "[get_wea"):
        assert events([piece], ALL, required=True) == []
        assert events([piece], ALL) == [Text(text=piece)]
    opened = events(["[add(", 'a="x'], ALL, required=True)
    assert opened == events(["[add(", 'a="x'], ALL) != []
