"""What is asked for behind a question mark, and lists that come page by page, as all of OpenAI's APIs have them."""

from typing import Annotated, Any, Literal, TypeVar

from fastapi import Request
from pydantic import ConfigDict, Field, ValidationError

from herd.serve.wire import Wire, usage_error


class Query(Wire):
    """The fields behind a question mark."""

    model_config = ConfigDict(strict=False)  # numbers come as text


class Page(Query):
    """Which part of a list."""

    after: str | None = None  # an id: the list goes on behind it
    limit: Annotated[int, Field(ge=1, le=100)] = 20


class OrderedPage(Page):
    order: Literal["asc", "desc"] = "desc"  # desc: the newest first


Form = TypeVar("Form", bound=Query)


def read_query(request: Request, form: type[Form]) -> Form:
    """The fields; one that stands several times, or with [] behind its name, is a list. Raises `UsageError`."""
    given: dict[str, Any] = {}
    for name, value in request.query_params.multi_items():
        plain = name.removesuffix("[]")
        given[plain] = [*given.get(plain, ()), value] if plain != name or isinstance(given.get(plain), list) else value
    try:
        return form.model_validate(given)
    except ValidationError as error:
        raise usage_error(error) from None


def list_object(objects: list[dict[str, Any]], limit: int) -> dict[str, Any]:
    """A page as OpenAI tells it. objects: those of the page, and one more where there is one."""
    has_more, objects = len(objects) > limit, objects[:limit]
    ends = {"first_id": objects[0]["id"], "last_id": objects[-1]["id"]} if objects else {"first_id": None, "last_id": None}
    return {"object": "list", "data": objects, **ends, "has_more": has_more}
