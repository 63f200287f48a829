"""OpenAI's Responses API: a third wire form of the same requests and the same events, with a memory.

There is one way through: a response is its events, and one that is not streamed is the last of them. What is kept is kept before the last
event is sent, so that who has it can continue at once. A response that fails, or that its client leaves, is not kept.
"""

import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Annotated, Any, ClassVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BeforeValidator

from herd.chat import Backend, ChatEvent, ChatRequest, TextBackend
from herd.errors import UsageError
from herd.serve.api import check_model
from herd.serve.choices import Told, side_by_side
from herd.serve.config import ServeConfig
from herd.serve.connection import caller, is_background, meter, read_body, reply_to
from herd.serve.fetch import fetched
from herd.serve.lists import OrderedPage, Query, list_object, read_query
from herd.serve.metrics import Metrics
from herd.serve.responses.events import Answer, Event, line
from herd.serve.responses.request import chat_request, given_items, head, in_words_of_responses, with_pictures
from herd.serve.responses.schema import Includable, Item, ResponsesBody
from herd.serve.responses.store import Responses
from herd.serve.sse import EventStream
from herd.serve.store import Store, owner
from herd.serve.wire import new_id, shown_value

Included = Annotated[list[Includable] | None, BeforeValidator(lambda given: [given] if isinstance(given, str) else given)]


class FindQuery(Query):
    """Of GET /v1/responses/{id}. Only responses that are made in the background could be streamed again, and herd makes none."""

    include: Included = None

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"stream": ("false",), "starting_after": ()}
    ignored = frozenset({"include_obfuscation"})


class ItemPage(OrderedPage):
    """Of the items that a response was made from."""

    include: Included = None


def add_responses(app: FastAPI, backend: Backend, config: ServeConfig, metrics: Metrics, store: Store) -> None:
    """The routes."""
    kept = Responses(store, int(config.responses_gib * (1 << 30)), config.responses_days)

    async def read(request: Request) -> tuple[ResponsesBody, list[Item], ChatRequest]:
        """The body, its items, and what it asks for together with what was stored."""
        body = await read_body(request, ResponsesBody, config.max_body_bytes)
        check_model(backend, body.model)
        body, who = with_pictures(body, await fetched(request, body)), owner(caller(request))
        with in_words_of_responses():
            previous = body.previous_response_id
            past = [] if previous is None else [Item.model_validate(told) for told in kept.past(who, previous)]
            new = given_items(body, past, lambda id, param: Item.model_validate(kept.item(who, id, param)))
            return body, new, chat_request(body, past, new, caller(request))

    @app.post("/v1/responses")
    async def create(request: Request) -> Response:
        body, new, asked = await read(request)
        asked = replace(asked, background=is_background(request))
        who, previous, is_stored = owner(caller(request)), body.previous_response_id, _is_stored(body, kept)
        inputs = [item.told(new_id("msg_" if item.type == "message" else "fc_")) for item in new]
        if is_stored:
            kept.check_room(who, inputs, previous)
        told = Told(body.model, metrics, meter(request))

        def finish(response: dict[str, Any]) -> dict[str, Any]:
            if is_stored:
                kept.save(who, response, inputs)
            return {**response, "timings": told.timings()} if body.timings else response

        response = {"id": new_id("resp_"), "object": "response", "created_at": int(time.time()), **head(body, is_stored=is_stored)}
        answer = Answer(response, finish)
        events = answer.events(told.read(side_by_side([_replies(backend, asked)])))
        if body.stream:
            return EventStream(_lines(events), config, answer.failure)
        return JSONResponse(await reply_to(request, _last(events)))

    if isinstance(backend, TextBackend):

        @app.post("/v1/responses/input_tokens")
        async def input_tokens(request: Request) -> dict[str, Any]:
            _, _, asked = await read(request)
            return {"object": "response.input_tokens", "input_tokens": len((await backend.tokenize(asked)).tokens)}

    @app.get("/v1/responses/{response_id}")
    async def find(request: Request, response_id: str) -> dict[str, Any]:
        read_query(request, FindQuery)
        return kept.find(owner(caller(request)), response_id)

    @app.delete("/v1/responses/{response_id}")
    async def delete(request: Request, response_id: str) -> dict[str, Any]:
        kept.delete(owner(caller(request)), response_id)
        return {"id": response_id, "object": "response", "deleted": True}

    @app.post("/v1/responses/{response_id}/cancel")
    async def cancel(request: Request, response_id: str) -> None:
        kept.find(owner(caller(request)), response_id)
        text = f"{response_id!r} cannot be cancelled: only responses that are made in the background can, and herd makes none"
        raise UsageError(text, "close the connection of a response that is being made, and its work stops", param="response_id")

    @app.get("/v1/responses/{response_id}/input_items")
    async def input_items(request: Request, response_id: str) -> dict[str, Any]:
        page = read_query(request, ItemPage)
        return _page(kept.inputs(owner(caller(request)), response_id), page)


def _is_stored(body: ResponsesBody, kept: Responses) -> bool:
    """Unless the body says otherwise. Raises `UsageError` where it asks for what there is not."""
    if body.store and not kept.keeps_any:
        raise UsageError("store is true, and this server keeps no responses", "leave it out, or raise --responses-gib", param="store")
    return body.store is not False and kept.keeps_any


async def _replies(backend: Backend, asked: ChatRequest) -> AsyncGenerator[ChatEvent, None]:
    with in_words_of_responses():
        async with aclosing(backend.chat(asked)) as events:
            async for event in events:
                yield event


async def _lines(events: AsyncGenerator[Event, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(events):
        async for event in events:
            yield line(event)


async def _last(events: AsyncGenerator[Event, None]) -> dict[str, Any]:
    """The whole response."""
    last: Event = {}
    async with aclosing(events):
        async for event in events:
            last = event
    response: dict[str, Any] = last["response"]
    return response


def _page(items: list[dict[str, Any]], page: ItemPage) -> dict[str, Any]:
    """A page of a list that is at hand as a whole, the oldest first."""
    ordered = items if page.order == "asc" else items[::-1]
    if page.after is not None:
        places = [place for place, item in enumerate(ordered) if item["id"] == page.after]
        if not places:
            raise UsageError(f"after is {shown_value(page.after)}, which is none of the items", "give the id of one", param="after")
        ordered = ordered[places[0] + 1 :]
    return list_object(ordered, page.limit)
