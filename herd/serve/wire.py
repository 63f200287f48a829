"""The manners of every JSON object from outside: what is honoured is a field, what is not is refused by name.

Each documented field of a request is in exactly one of three groups, and an unknown one is an error that names the nearest:

* honoured: the fields of the class;
* neutral: known, but herd cannot do it, so that only a value which asks for nothing is taken, and null always is;
* ignored: without effect on the reply by the API's own contract (bookkeeping, billing, caching), or because Llama 4's prompt format has no
  place for it.
"""

import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from herd.errors import UsageError, nearest


def problem(problem: str, hint: str, *, field: str = "", code: str = "") -> PydanticCustomError:
    """An error in herd's own words about the value at hand, or about one field of it."""
    return PydanticCustomError("herd", "{problem}", {"problem": problem, "hint": hint, "field": field, "code": code})


class Wire(BaseModel):
    """A JSON object from outside."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}  # field: the values that ask for nothing, beside null
    ignored: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def honoured(cls) -> list[str]:
        """Names of the fields as they are on the wire."""
        return [field.alias or name for name, field in cls.model_fields.items()]

    @model_validator(mode="before")
    @classmethod
    def _sort_fields(cls, data: Any) -> Any:
        """Refuse what is unknown or not neutral; pass on what is honoured."""
        if not isinstance(data, dict):
            return data
        honoured = cls.honoured()
        for name, value in data.items():
            if name in cls.neutral:
                if value is not None and value not in cls.neutral[name]:
                    allowed = " or ".join([shown_value(v) for v in cls.neutral[name]] or ["null"])
                    text = f"is {shown_value(value)}, which herd does not support; it takes only {allowed}"
                    raise problem(text, f"leave {name} out", field=name, code="unsupported_parameter")
            elif name not in honoured and name not in cls.ignored:
                hint = nearest(name, [*honoured, *cls.neutral, *cls.ignored]) or f"there are: {', '.join(honoured)}"
                raise problem("is an unknown field", hint, field=name, code="unknown_parameter")
        return {name: value for name, value in data.items() if name in honoured}


def holds(wire: Wire, kind: str, needed: Sequence[str], own: Sequence[str] = ()) -> None:
    """Whether an object has all that its type needs, and nothing of other types. own: what it may have beside that."""
    for field in type(wire).model_fields:
        is_given = getattr(wire, field) is not None
        if field in needed and not is_given:
            raise problem("is missing", f"a {kind} holds {', '.join(needed)}", field=field)
        if is_given and field not in ("type", *own, *needed):
            raise problem(f"stands in a {kind}", f"a {kind} holds {', '.join(needed)}", field=field)


def usage_error(error: ValidationError) -> UsageError:
    """The first thing that pydantic found wrong, as an error that names the field, the value and the limit."""
    first = error.errors(include_url=False)[0]
    context = first.get("ctx", {})
    param = ".".join(str(step) for step in (*first["loc"], context.get("field")) if step not in (None, ""))
    name = param or "the body"
    match first["type"]:
        case "herd":
            found = UsageError(f"{name} {context['problem']}", context["hint"], param=param)
            found.code = context["code"] or None
            return found
        case "json_invalid":
            return UsageError(f"the body is not JSON: {context['error']}", "send one JSON object")
        case "missing":
            return UsageError(f"{name} is missing", f"give {name}", param=param)
        case "model_type":
            return UsageError(f"{name} is {shown_value(first['input'])}; it must be a JSON object", param=param or None)
    limit = first["msg"].replace("Input should", "it should").replace("List should", "the list should")
    return UsageError(f"{name} is {shown_value(first['input'])}; {limit}", param=param)


def new_id(prefix: str) -> str:
    """An id that nobody can guess."""
    return prefix + secrets.token_hex(24)


def shown_value(value: Any) -> str:
    """A value as the client wrote it, cut to a line."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
