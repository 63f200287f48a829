r"""What a reply may be, as a grammar for llguidance: formats of the text, and calls of tools in the form that the prompt asks for.

A reply that must call is calls and nothing else. One that may call is free until a call opens; from there on the call is held to its
tool's schema (a lazy grammar), so that a call that has begun is sure to be one. JSON has one space after ":" and ",", as models write it,
and no other white space: small models lose themselves in it.

Calls in Python's form take their arguments in the schema's order. The values are JSON, but for True, False and None at the top, which the
reader of calls (calls.py) takes both ways.
"""

import json
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from herd.chat import Format, Tool, ToolChoice
from herd.errors import UsageError
from herd.log import log
from herd.text.calls import KEYWORD

_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_ANNOTATIONS = {"title", "description", "default", "examples", "$schema", "$id", "$comment", "deprecated"}
_PLAIN_OBJECT = {"type", "properties", "required", "additionalProperties", "$defs", "definitions", *_ANNOTATIONS}
MOST_CHARS = 16_384  # of a pattern or a choice
_SPACE = r"[ \t\r\n]*"
_ws = r"/[ \n]?/"


def reply_grammar(
    form: Format | None, tools: Sequence[Tool], choice: ToolChoice, tool_format: str, specials: Container[str] = ()
) -> str | None:
    """The grammar of a reply, or None where it is free. Raises `UsageError` for what cannot be written as one.

    tool_format: "pythonic", "json" or "tags".  specials: names of the vocabulary's special tokens; of these, two may stand around calls.
    """
    allowed = [tool for tool in tools if not choice.names or tool.name in choice.names]
    if not allowed or choice.mode == "none":
        return None if form is None else json.dumps({"grammars": [format_grammar(form)]})
    calls = _Calls(allowed, tool_format, parallel=choice.parallel)
    if choice.mode == "required":
        rules, others = calls.required(), []
    elif form is not None:
        rules, others = ["start: calls | @format", *calls.required("calls")], [format_grammar(form, "format")]
    else:
        rules, others = calls.lazy([mark for mark in ("<|python_start|>", "<|python_end|>") if mark in specials]), []
    return json.dumps({"grammars": [{"name": "reply", "lark_grammar": "\n".join(rules)}, *others]})


def guarded(choice: ToolChoice, tool_format: str) -> frozenset[str]:
    """The forms of calls that the grammar of such a reply completes once they have opened."""
    return frozenset() if choice.mode == "none" else frozenset([tool_format])


def format_grammar(form: Format, name: str = "reply") -> dict[str, Any]:
    """One format as a grammar of llguidance's. Raises `UsageError` for a grammar that is broken on its face."""
    long = next((text for text in _texts(form) if len(text) > MOST_CHARS), "")
    if long:
        text = f"the {form.kind} {long[:20]!r}... has {len(long):,} characters; {MOST_CHARS:,} is the limit"
        raise UsageError(text, "make it shorter", param="response_format")
    match form.kind:
        case "json_object":
            return {"name": name, "json_schema": {"type": "object", "x-guidance": _COMPACT}}
        case "json_schema":
            return {"name": name, "json_schema": _schema(form.value, lenient=not form.strict)}
        case "regex":
            return {"name": name, "lark_grammar": f"start: /{_between_slashes(form.value)}/"}
        case "choice":
            return {"name": name, "lark_grammar": "start: " + " | ".join(map(_quoted, form.value))}
        case "gbnf":
            return {"name": name, "lark_grammar": _from_gbnf(form.value)}
        case _:
            return {"name": name, "lark_grammar": form.value}


def _texts(form: Format) -> tuple[str, ...]:
    return (form.value,) if form.kind == "regex" else form.value if form.kind == "choice" else ()


def refused(message: str, param: str) -> UsageError:
    """The error for a grammar that llguidance does not take. message: llguidance's own."""
    first = re.sub(r"^at \d+\(\d+\): failed to compile JSON schema: |\n\s*\d+ \|(?s:.*)", "", message).strip().replace("\n", " ")
    keys = re.match(r"Unimplemented keys: (\[.*\])", first)
    if keys:
        names = ", ".join(json.loads(keys[1]))
        return UsageError(f"the JSON schema uses {names}, which cannot be enforced", f"leave out {names}", param=param)
    for pattern, keyword in _KEYWORDS.items():
        if re.search(pattern, first) and not re.match(r"at \d+\(\d+\): ", first):  # which is of a grammar, and quotes it
            return UsageError(
                f"the JSON schema's {keyword} cannot be enforced: {first:.300}", f"change or leave out {keyword}", param=param
            )
    return UsageError(f"the reply cannot be held to this: {first:.300}", "change the schema or the grammar", param=param)


_KEYWORDS = {  # what llguidance says of it -> the keyword
    r"schema is false": "false",
    r"^Unknown format": "format",
    r"^oneOf": "oneOf",
    r"^Invalid type": "type",
    r"(?i)pointer|resource|anchor|reference": "$ref",
    r"^patternProp": "patternProperties",
    r"minimum|maximum": "minimum",
    r"minItems|maxItems": "minItems",
    r"minLength|maxLength": "minLength",
    r"minProperties|maxProperties": "minProperties",
    r"multipleOf": "multipleOf",
    r"required": "required",
    r"anyOf|enum": "enum",
    r"^regex parse|look-?a": "pattern",
}


def _schema(schema: Any, *, lenient: bool = False, param: str = "response_format") -> Any:
    """A schema with how to write it. Raises `UsageError` for what JSON cannot hold."""
    whole = dict(schema) if isinstance(schema, Mapping) else {"allOf": [schema]}
    try:
        json.dumps(whole)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"the JSON schema is no JSON: {error}", "make it of dicts, lists, texts and numbers", param=param) from error
    if not lenient and (keyword := _rounded(whole)):
        message = f"the JSON schema's {keyword} has a whole number beyond 2^53 that no double holds: it cannot be enforced"
        raise UsageError(message, "write it as a string, or let it go", param=param)
    return {**whole, "x-guidance": {**_COMPACT, "lenient": lenient}}


def _rounded(value: Any, keyword: str = "") -> str:
    """The key under which there is a whole number that llguidance, which holds numbers as doubles, would make another; "" for none."""
    if isinstance(value, Mapping):
        return next((found for key, part in value.items() if (found := _rounded(part, key))), "")
    if isinstance(value, list):
        return next((found for part in value if (found := _rounded(part, keyword))), "")
    is_rounded = isinstance(value, int) and (abs(value) > 1 << 1023 or int(float(value)) != value)
    return keyword if is_rounded else ""


@lru_cache(maxsize=1024)
def _fault(schema: str) -> str:
    """Why llguidance does not take a schema, or ""."""
    from llguidance import LLMatcher

    is_error, messages = LLMatcher.validate_grammar_with_warnings(json.dumps({"grammars": [{"json_schema": json.loads(schema)}]}))
    return messages[0].splitlines()[0] if is_error else ""


def _of_tool(schema: Any, tool: Tool) -> str:
    """A schema of a tool's arguments, as JSON. What of it cannot be enforced is left to the model where the tool is not strict: keywords
    one by one where llguidance can do without them, else properties, else all of it.
    """
    whole = _schema(schema, lenient=not tool.strict, param="tools")
    if tool.strict or not _fault(json.dumps(whole)):
        return json.dumps(whole)
    log.debug("tool %s: a schema of its arguments is enforced in part only: %s", tool.name, _fault(json.dumps(whole)))
    properties = whole.get("properties")
    if isinstance(properties, Mapping) and whole.get("type") == "object":
        shared = {key: whole[key] for key in ("$defs", "definitions") if key in whole}
        kept = {
            key: True if _fault(json.dumps(_schema({**shared, **_mapping(part)}, lenient=True))) else part
            for key, part in properties.items()
        }
        looser = {**whole, "properties": kept}
        if not _fault(json.dumps(looser)):
            return json.dumps(looser)
    return json.dumps(_schema({"type": "object"} if whole.get("type") == "object" else True, lenient=True))


def _mapping(schema: Any) -> Mapping[str, Any]:
    return schema if isinstance(schema, Mapping) else {"allOf": [schema]}


def _quoted(text: str) -> str:
    return json.dumps(text)


def _between_slashes(pattern: str) -> str:
    r"""A pattern as Lark has it. \d is 0 to 9, not every digit of Unicode."""
    from llguidance import regex_to_lark

    return str(regex_to_lark(pattern, "d"))


def _from_gbnf(text: str) -> str:
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return str(any_to_lark(text))
    except Exception as error:  # its own class, and others for what it does not expect
        raise UsageError(f"the GBNF grammar is broken: {error}", "check it with llama.cpp", param="response_format") from error


class _Calls:
    """Calls of some tools in one form, as rules of Lark's."""

    def __init__(self, tools: Sequence[Tool], tool_format: str, *, parallel: bool) -> None:
        self.tools, self.form, self.parallel = tools, tool_format, parallel

    def required(self, start: str = "start") -> list[str]:
        """Rules whose `start` is one call or more."""
        more = {"pythonic": '(", " call)*', "json": "call*", "tags": '(",\\n" call)*'}[self.form] if self.parallel else ""
        around = {"pythonic": '"[" {} "]"', "json": "{}", "tags": '"<tool_call>[\\n" {} "\\n]</tool_call>"'}[self.form]
        return [f"{start}: {around.format(f'call {more}')}", *self._rules()]

    def lazy(self, marks: list[str]) -> list[str]:
        """Rules whose `start` is text, with calls that open where they are named. marks: special tokens that may stand in the text."""
        rules = ["start: part* TEXT", r"TEXT: /(?s:.*)/"]
        if self.form == "tags":
            more = f'("," {_ws} call)*' if self.parallel else ""
            rules += [f'part: open {_ws} "[" {_ws} (call {more} {_ws})? "]" {_ws} "</tool_call>"', r"open[lazy]: /(?s:.*)<tool_call>/"]
            return [*rules, *self._rules()]
        parts = []
        for i, tool in enumerate(self.tools):
            names = "|".join(sorted({tool.name, tool.name.replace("-", "_")}))
            if self.form == "pythonic":
                opening, rest = rf"\[{_SPACE}({names}){_SPACE}\(", f'args_{i} ")" {self._more_python()} "]"'
            else:
                kind = rf'("type"{_SPACE}:{_SPACE}"function"{_SPACE},{_SPACE})?'
                opening, rest = rf'\{{{_SPACE}{kind}"name"{_SPACE}:{_SPACE}"({names})"', f'", \\"parameters\\": " args_{i} "}}"'
            rules.append(f"open_{i}[lazy]: /(?s:.*){opening}/")
            parts.append(f"open_{i} {rest}")
        return [*rules, f"part: {' | '.join([*parts, *(f'TEXT {mark}' for mark in marks)])}", *self._rules()]

    def _more_python(self) -> str:
        return '(", " call)*' if self.parallel else ""

    def _rules(self) -> Iterator[str]:
        yield "call: " + " | ".join(f"call_{i}" for i in range(len(self.tools)))
        for i, tool in enumerate(self.tools):
            if self.form == "pythonic":
                yield f'call_{i}: "{tool.name}(" args_{i} ")"'
                yield from self._keywords(i, tool)
            else:
                key = "parameters" if self.form == "json" else "arguments"
                yield f'call_{i}: "{{\\"name\\": \\"{tool.name}\\", \\"{key}\\": " args_{i} "}}"'
                yield f"args_{i}: %json {_of_tool(_object(tool), tool)}"

    def _keywords(self, i: int, tool: Tool) -> Iterator[str]:
        """Rules of a tool's arguments in Python's form: its properties in order, those that are not required at will."""
        schema = _object(tool)
        if tool.strict and (other := schema.keys() - _PLAIN_OBJECT):
            names = ", ".join(sorted(other))
            hint = "put it inside a property, or make the tool not strict"
            raise UsageError(f"the parameters of {tool.name} use {names}, which cannot be enforced in Python's form", hint, param="tools")
        properties = schema.get("properties") or {}
        required = set(schema.get("required") or ())
        keys = [key for key in dict.fromkeys([*properties, *sorted(required)]) if KEYWORD.fullmatch(key)]
        if tool.strict and (odd := [key for key in (*properties, *required) if not KEYWORD.fullmatch(key)]):
            raise UsageError(f"{tool.name} has a parameter called {odd[0]!r}, which Python's form cannot write", "rename it", param="tools")
        shared: dict[str, Any] = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        for k, key in enumerate(keys):
            yield from self._value(f"v_{i}_{k}", properties.get(key, True), shared, tool)
        yield f"args_{i}: {self._from(i, 0, keys, required, '')}"
        for k in range(1, len(keys) + 1):
            yield f"more_{i}_{k}: {self._from(i, k, keys, required, ', ')}"

    def _from(self, i: int, k: int, keys: list[str], required: set[str], comma: str) -> str:
        """Any of the arguments from the k-th on that may come next, with all that follow."""
        ways = []
        for j in range(k, len(keys)):
            ways.append(f'"{comma}{keys[j]}=" v_{i}_{j} more_{i}_{j + 1}')
            if keys[j] in required:
                return " | ".join(ways)
        return " | ".join([*ways, '""'])

    def _value(self, rule: str, schema: Any, shared: dict[str, Any], tool: Tool) -> Iterator[str]:
        kind = schema.get("type") if isinstance(schema, Mapping) else None
        kinds = {one for one in (kind if isinstance(kind, list) else [kind]) if isinstance(one, str)}
        if kinds & {"boolean", "null"} and isinstance(schema, Mapping) and not schema.keys() - _ANNOTATIONS - {"type"}:
            words = ['"True"', '"False"'] * ("boolean" in kinds) + ['"None"'] * ("null" in kinds)
            rest = sorted(kinds - {"boolean", "null"})
            if rest:
                yield f"{rule}_j: %json {_of_tool({**schema, 'type': rest}, tool)}"
                words.append(f"{rule}_j")
            yield f"{rule}: {' | '.join(words)}"
            return
        yield f"{rule}: %json {_of_tool({**shared, **_mapping(schema)}, tool)}"


def _object(tool: Tool) -> dict[str, Any]:
    """The schema of a tool's arguments: an object whatever it says, and closed where it names properties and does not say."""
    if not tool.parameters:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    whole = {**tool.parameters, "type": "object"}
    properties, required = whole.get("properties", {}), whole.get("required", [])
    if not isinstance(properties, Mapping) or not isinstance(required, list) or not all(isinstance(key, str) for key in required):
        message = f"the parameters of {tool.name} are no JSON schema: properties is no object, or required no list of names"
        raise UsageError(message, "write them as JSON Schema has it", param="tools")
    return {"additionalProperties": False, **whole} if "properties" in whole and not whole.keys() - _PLAIN_OBJECT else whole
