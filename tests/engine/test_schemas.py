"""Random JSON schemas: what is accepted is kept to, whatever is drawn, and what is refused is refused by name. The judge is jsonschema.

`bench/schemas.py` does the same with published schemas and a whole engine.
"""

import json
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.chat import Format, ToolChoice
from herd.engine.grammar import Grammar, Grammars
from herd.errors import UsageError
from herd.text.grammar import reply_grammar
from herd.text.tokenizer import byte_tokenizer

BYTES = byte_tokenizer()
GRAMMARS = Grammars(BYTES, 512, (257, 260, 261))
CLOSERS = [ord(char) for char in '"]}']
Schema = dict[str, Any]

BOUNDS = st.tuples(st.integers(-50, 50), st.integers(0, 60)).map(lambda pair: {"minimum": pair[0], "maximum": pair[0] + pair[1]})
SIZES = st.tuples(st.integers(0, 2), st.integers(0, 3))
INTEGERS = st.integers(-(1 << 53), 1 << 53)  # beyond, those that a double does not hold are refused
LEAVES: st.SearchStrategy[Schema] = st.one_of(
    st.builds(lambda bounds: {"type": "integer", **bounds}, BOUNDS),
    st.builds(lambda bounds: {"type": "number", **bounds}, BOUNDS),
    st.builds(lambda size: {"type": "string", "minLength": size[0], "maxLength": sum(size)}, SIZES),
    st.sampled_from([{"type": "string", "pattern": pattern} for pattern in ("^a+b?$", "[0-9]{2}", "^(x|yé)*$", r"^\S\d$")]),
    st.sampled_from([{"type": "string", "format": kind} for kind in ("date", "time", "uuid", "ipv4", "date-time")]),
    st.lists(st.none() | st.booleans() | INTEGERS | st.text(max_size=4), min_size=1, max_size=3).map(lambda all_of: {"enum": all_of}),
    st.builds(lambda value: {"const": value}, st.text(max_size=5) | INTEGERS | st.lists(INTEGERS, max_size=2)),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["boolean", "integer", "null"]}]),
    st.just({"$ref": "#/$defs/node"}),
)


def an_object(properties: dict[str, Schema], required: list[bool], is_open: bool) -> Schema:
    names = [name for name, needed in zip(properties, required, strict=False) if needed]
    return {"type": "object", "properties": properties, "required": names} | ({} if is_open else {"additionalProperties": False})


SCHEMAS: st.SearchStrategy[Schema] = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(lambda item, size: {"type": "array", "items": item, "minItems": size[0], "maxItems": sum(size)}, inner, SIZES),
        st.builds(
            lambda first, rest: {"type": "array", "prefixItems": first, "items": rest, "maxItems": 3}, st.lists(inner, max_size=2), inner
        ),
        st.builds(an_object, st.dictionaries(st.text('abé"\\ ', max_size=3), inner, max_size=3), st.lists(st.booleans()), st.booleans()),
        st.builds(lambda ways: {"anyOf": ways}, st.lists(inner, min_size=1, max_size=3)),
    ),
    max_leaves=6,
)
NODE = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}, "v": {"type": "boolean"}}, "additionalProperties": False}


def whole(schema: Schema) -> Schema:
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$defs": {"node": NODE}, **schema}


def grammar(schema: Schema) -> Grammar:
    text = reply_grammar(Format(kind="json_schema", value=schema), (), ToolChoice(), "pythonic")
    assert text is not None
    return GRAMMARS.compile(text, "response_format")


def reply(held: Grammar, seed: int, most: int = 400) -> str | None:
    """What comes of random draws, or None if it does not end."""
    generator, out = torch.Generator().manual_seed(seed), bytearray()
    for _ in range(most):
        logits = torch.randn(512, generator=generator)
        logits[CLOSERS] += 2
        held.mask(logits)
        token = int(logits.argmax())
        held.read(token)
        out += BYTES.token_bytes(token)
        if held.is_finished:
            return out.decode()
    return None


@settings(max_examples=120)
@given(schema=SCHEMAS, seed=st.integers(0, 1000))
def test_every_reply_fits_its_schema(schema: Schema, seed: int) -> None:
    schema = whole(schema)
    text = reply(grammar(schema), seed)
    if text is not None:
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))
        assert json.dumps(json.loads(text), ensure_ascii=False).count(" ") >= text.count(", ")  # no white space but one after , and :


@settings(max_examples=40)
@given(schema=SCHEMAS, data=st.data())
def test_a_keyword_that_cannot_be_enforced_is_named_wherever_it_stands(schema: Schema, data: st.DataObject) -> None:
    word = data.draw(st.sampled_from(["uniqueItems", "not", "contains", "propertyNames", "dependentRequired", "unevaluatedItems"]))
    values = {"uniqueItems": True, "not": {"const": 7}, "contains": {"const": 1}, "propertyNames": {"maxLength": 1}}
    odd = {word: values.get(word, {"a": ["b"]} if word == "dependentRequired" else False)}
    for wrapped in (
        odd,
        {"type": "array", "items": {"anyOf": [schema, odd]}, "minItems": 1},
        {"properties": {"x": odd}, "required": ["x"]},
    ):
        with pytest.raises(UsageError, match=word) as caught:
            grammar(whole(wrapped))
        assert caught.value.param == "response_format"
