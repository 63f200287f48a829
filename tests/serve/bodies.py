"""Requests that nobody would send, one for each number: by every route's own form, nearly right, then broken as text and as bytes.

The forms are the pydantic models that routes read, found by asking each route with `{}`, so that a new route is fuzzed without a word here.
"""

import json
import random
import re
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.testclient import TestClient

from herd.serve.wire import Wire
from tests.serve.samples import IMAGE

DEEP = 10_000
STRINGS = (
    "", " ", "a", "hi", "\x00", "é😀", "\u202e", "'\"\\/", "../../etc/passwd", "<|eot|>", "data:image/png;base64,", "data:,",
    "http://x/y.png", "{}", '{"a": 1}', "[" * DEEP, '{"a":' * DEEP, "(" * DEEP, "a" * 100_000, "%s{}", "-1", "1e400",
    "null", 'root ::= "a"', "a*", "\ud800",
)  # fmt: skip
NUMBERS = (0, 1, -1, 2, 0.5, 1e-320, 1e308, 2**31, 2**53 + 1, -(2**63), 2**64, 10**30, 1.5)
JUNK: tuple[Any, ...] = (None, True, False, [], {}, [[]], [None], {"": None}, {"type": "text"}, *NUMBERS, *STRINGS)
RAW = ("NaN", "Infinity", "-Infinity", "1e400", "-0", "9" * 5000, "1E+", "01", "+1", '"\\ud800"', '"\\udc00\\ud800"', '"\\x"', "nul",
       "[" * DEEP, '{"a":' * DEEP, "[" * DEEP + "]" * DEEP, '"\x01"', "", "//",
       "\ufeff", "{,}", "[1,]", "'a'", '"' + "z" * 100_000 + '"')  # fmt: skip
KINDS = (
    "application/json",
    "application/json; charset=utf-16",
    "APPLICATION/JSON",
    "text/plain",
    "",
    "multipart/form-data",
    "a" * 300,
    "é",
    "json",
)


def forms(app: FastAPI) -> dict[str, type[Wire] | None]:
    """The routes that take a POST, and the form that each reads, None for one that reads none as JSON."""
    found: dict[str, type[Wire] | None] = {}
    read = Wire.model_validate_json
    with TestClient(app) as client:
        for route in app.routes:
            if isinstance(route, APIRoute) and "POST" in route.methods:
                path = re.sub(r"{.*?}", "x", route.path)
                found[path] = None

                def noted(cls: type[Wire], *args: Any, path: str = path, **more: Any) -> Any:
                    found[path] = cls
                    return read.__func__(cls, *args, **more)  # type: ignore[attr-defined]

                Wire.model_validate_json = classmethod(noted)  # type: ignore[assignment, method-assign]
                try:
                    client.post(path, json={})
                finally:
                    del Wire.model_validate_json
    return found


class Bodies:
    """Paths, headers and bodies by number."""

    def __init__(self, forms: dict[str, type[Wire] | None], model: str) -> None:
        self.model = model
        self.paths = sorted([*forms, *2 * [path for path, form in forms.items() if form]])  # what can fail in more ways more often
        self.forms = {path: form for path, form in forms.items() if form}
        self.schemas = {form: form.model_json_schema() for form in self.forms.values() if form}

    def case(self, number: int) -> tuple[str, str, list[tuple[bytes, bytes]], bytes]:
        """Method, path, headers and body."""
        rng = random.Random(number)
        path = rng.choice(self.paths)
        form = self.forms.get(path) if rng.random() < 0.95 else None
        form = form or rng.choice(list(self.schemas))
        wrong = rng.choice((0.0, 0.0, 0.01, 0.05, 0.3))
        body = Maker(rng, self.schemas[form], self.model, wrong).body(form)
        text = json.dumps(body, ensure_ascii=rng.random() < 0.5)
        data = text.encode("utf-8", errors="surrogatepass")
        for _ in range(rng.choice((0, 0, 0, 1, 2))):
            data = rng.choice(BREAKS)(rng, data)
        kind = "application/json" if rng.random() < 0.95 else rng.choice(KINDS)
        headers = [(b"content-type", kind.encode())]
        if rng.random() < 0.05:
            headers.append(
                (rng.choice((b"authorization", b"x-api-key", b"x-request-id", b"accept")), rng.randbytes(rng.randrange(200)).hex().encode())
            )
        method = "POST" if rng.random() < 0.97 else rng.choice(("GET", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "X"))
        return method, path if rng.random() < 0.98 else path + rng.choice(("/", "/x", "%00", "//", "?a=%ff", "x" * 5000)), headers, data


class Maker:
    """One body, by a JSON schema."""

    def __init__(self, rng: random.Random, schema: dict[str, Any], model: str, wrong: float) -> None:
        self.rng, self.defs, self.schema, self.model, self.wrong = rng, schema.get("$defs", {}), schema, model, wrong

    def body(self, form: type[Wire]) -> Any:
        body = self.value(self.schema)
        if isinstance(body, dict):
            body = dict(body)  # which may be one of JUNK
            for name in (*form.neutral, *form.ignored):
                if self.rng.random() < 0.03:
                    body[name] = self.rng.choice((*form.neutral.get(name, ()), *JUNK)) if self.rng.random() < 0.9 else {}
        return body

    def value(self, schema: dict[str, Any], name: str = "", depth: int = 0) -> Any:
        rng = self.rng
        if rng.random() < self.wrong or depth > 12:
            return rng.choice(JUNK)
        if name in ("content", "system", "prompt", "input") and rng.random() < 0.6:
            return self.string(name)
        if "$ref" in schema:
            return self.value(self.defs[schema["$ref"].rpartition("/")[2]], name, depth)
        if "anyOf" in schema:
            return self.value(rng.choice(schema["anyOf"]), name, depth + 1)
        if name == "role" and rng.random() < 0.6:
            return "user"
        if "enum" in schema or "const" in schema:
            return rng.choice(schema.get("enum") or [schema["const"]])
        match schema.get("type"):
            case "object":
                return self.object(schema, name, depth)
            case "array":
                room = 1 if rng.random() < 0.8 else rng.choice((0, 2, 3, 8))
                return [self.value(schema.get("items", {}), f"one of {name}", depth + 1) for _ in range(room)]
            case "string":
                return self.string(name)
            case "boolean":
                return rng.random() < 0.5
            case "integer":
                return rng.choice((1, 1, 2, 3, 8)) if rng.random() < 0.9 else rng.choice(NUMBERS)
            case "number":
                return rng.choice((0, 0.5, 1, 1.0)) if rng.random() < 0.9 else rng.choice(NUMBERS)
            case "null":
                return self.string(name) if name in ("content", "prompt") else None
        return rng.choice(JUNK)

    def object(self, schema: dict[str, Any], name: str, depth: int) -> dict[str, Any]:
        rng, required = self.rng, schema.get("required", ())
        fields = schema.get("properties")
        if fields is None:  # anything: most often a JSON schema, or arguments
            extra = schema.get("additionalProperties")
            if isinstance(extra, dict):
                return {
                    str(rng.choice((0, 1, 65, 511, 512, 10**11, "x", "²"))): self.value(extra, name, depth + 1)
                    for _ in range(rng.randrange(4))
                }
            return json_schema(rng, 0) if rng.random() < 0.9 else {rng.choice(STRINGS): rng.choice(JUNK)}
        few = rng.choice((0.0, 0.0, 0.05, 0.2, 0.6))
        likely = (*required, "content", "prompt", *((rng.choice(list(fields)),) if not name else ()))
        names = [key for key in fields if (key in likely and rng.random() >= self.wrong) or rng.random() < few]
        rng.shuffle(names)
        made = {key: self.value(fields[key], key, depth + 1) for key in names}
        kind = made.get("type")
        if isinstance(kind, str) and kind in fields and rng.random() < 0.9:  # {"type": "text", "text": ...}
            return {"type": kind, kind: self.value(fields[kind], kind, depth + 1) or "x"}
        return made

    def string(self, name: str) -> str:
        rng = self.rng
        if name == "model" and rng.random() < 0.95:
            return self.model
        if name == "url" and rng.random() < 0.5:
            return str(IMAGE["image_url"]["url"])
        if name in ("arguments", "guided_json", "json"):
            return json.dumps(json_schema(rng, 0)) if rng.random() < 0.6 else rng.choice(STRINGS)
        return rng.choice(("hi", "a b c", "f", "tool-1", "Once upon a time")) if rng.random() < 0.7 else rng.choice(STRINGS)


def json_schema(rng: random.Random, depth: int) -> dict[str, Any]:
    """A JSON schema, or nearly."""
    inner: Callable[[], Any] = lambda: json_schema(rng, depth + 1) if depth < 3 else rng.choice((True, False, {}))  # noqa: E731
    ways: tuple[Callable[[], dict[str, Any]], ...] = (
        lambda: {"type": rng.choice(("string", "integer", "number", "boolean", "null", "array", "object", "x"))},
        lambda: {
            "type": "object",
            "properties": {rng.choice(("a", "b", "", "é", "a-b")): inner()},
            "required": rng.choice((["a"], [], ["z"], 1)),
        },
        lambda: {"type": "array", "items": inner(), "minItems": rng.choice((0, 3, 10**9, -1))},
        lambda: {"anyOf": [inner(), inner()]},
        lambda: {"$ref": rng.choice(("#", "#/$defs/a", "http://x", "#/properties/a"))},
        lambda: {"enum": [rng.choice(JUNK), "a", 1]},
        lambda: {"const": rng.choice(JUNK)},
        lambda: {
            "type": "string",
            "pattern": rng.choice((".*", "(", "a{1000}", "(?=a)", "[^\\s\\S]")),
            "maxLength": rng.choice((0, 5, 10**12)),
        },
        lambda: {
            "type": "integer",
            "minimum": rng.choice(NUMBERS),
            "maximum": rng.choice(NUMBERS),
            "multipleOf": rng.choice((1, 0, 3, 0.1)),
        },
        lambda: {
            rng.choice(("not", "if", "allOf", "oneOf", "uniqueItems", "format", "dependentRequired")): rng.choice(
                (inner(), [inner()], True)
            )
        },
    )
    return rng.choice(ways)()


def _at(rng: random.Random, data: bytes) -> int:
    return rng.randrange(len(data) + 1)


def _raw(rng: random.Random, data: bytes) -> bytes:
    """Another value in place of one that is there, whatever JSON says."""
    found = [match.span() for match in re.finditer(rb'"[^"\\]*"|-?\d[\d.e+-]*|true|false|null', data[:20_000])]
    start, stop = rng.choice(found) if found else (0, len(data))
    return data[:start] + rng.choice(RAW).encode("utf-8", errors="surrogatepass") + data[stop:]


def _slice(rng: random.Random, data: bytes) -> bytes:
    start, stop = sorted((_at(rng, data), _at(rng, data)))
    piece = rng.choice(
        (b"", data[start:stop] * 2, rng.randbytes(rng.randrange(20)), b" " * 100_000, b"\xff\xfe", b"\xed\xa0\x80", b"\x00", b"{", b"}")
    )
    return data[:start] + piece + data[stop if rng.random() < 0.5 else start :]


BREAKS: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    _raw,
    _raw,
    _slice,
    lambda rng, data: data[: _at(rng, data)],
    lambda rng, data: data.replace(b"{", b'{"model":1,', 1),  # a key twice
    lambda rng, data: data[:-1] + b',"' + rng.choice((b"messages", b"n", b"\xf0\x9f\x98\x80", b"__class__", b"")) + b'":1}',
    lambda rng, data: data + rng.choice((b"x", b"{}", b"\n\n", b"\x00")),
    lambda rng, data: rng.choice(
        (data.decode("utf-8", "replace").encode("utf-16"), b"\xef\xbb\xbf" + data, b"[" + data + b"]", b"", b"null", b"1")
    ),
)
