"""OpenAI's Responses API: a third wire form of the same requests and the same events, with a memory.

There is one way through: a response is its events, and one that is not streamed is the last of them. What is kept is kept before the last
event is sent, so that who has it can continue at once. A response that fails, or that its client leaves, is not kept.
"""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any, get_args

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from herd.chat import Backend, ChatEvent, ChatRequest
from herd.errors import UsageError, nearest
from herd.serve.api import check_model
from herd.serve.choices import Told, side_by_side
from herd.serve.config import ServeConfig
from herd.serve.connection import caller, is_background, meter, read_body, while_connected
from herd.serve.fetch import fetched
from herd.serve.metrics import Metrics
from herd.serve.responses.events import Answer, Event, line
from herd.serve.responses.request import chat_request, given_items, head, in_words_of_responses, with_pictures
from herd.serve.responses.schema import Includable, Item, ResponsesBody
from herd.serve.responses.store import Responses
from herd.serve.sse import EventStream
from herd.serve.store import Store, owner
from herd.serve.wire import new_id, shown_value

MOST_ITEMS, USUAL_ITEMS = 100, 20  # of one page of input items


def add_responses(app: FastAPI, backend: Backend, config: ServeConfig, metrics: Metrics, store: Store) -> None:
    """The routes."""
    kept = Responses(store, int(config.responses_gib * (1 << 30)), config.responses_days)

    @app.post("/v1/responses")
    async def create(request: Request) -> Response:
        body = await read_body(request, ResponsesBody, config.max_body_bytes)
        check_model(backend, body.model)
        body = with_pictures(body, await fetched(request, body))
        who, is_stored = owner(caller(request)), _is_stored(body, kept)
        with in_words_of_responses():
            previous = body.previous_response_id
            past = [] if previous is None else [Item.model_validate(told) for told in kept.past(who, previous)]
            new = given_items(body, past, lambda id, param: Item.model_validate(kept.item(who, id, param)))
            asked = replace(chat_request(body, past, new, caller(request)), background=is_background(request))
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
            return EventStream(_lines(events), config.ping_s, answer.failure)
        return JSONResponse(await while_connected(request.receive, _last(events)))

    @app.get("/v1/responses/{response_id}")
    async def find(request: Request, response_id: str) -> dict[str, Any]:
        query = _query(request, "include", "include_obfuscation", "stream", "starting_after")
        if query.get("stream", "false") != "false" or "starting_after" in query:
            text = "only responses that are made in the background can be streamed again, and herd makes none"
            raise UsageError(text, "leave stream and starting_after out", param="stream")
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
        query = _query(request, "after", "include", "limit", "order")
        return _page(kept.inputs(owner(caller(request)), response_id), query)


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


def _query(request: Request, *known: str) -> dict[str, str]:
    """The fields after the question mark. Raises `UsageError` for an unknown one."""
    query = {name.removesuffix("[]"): value for name, value in request.query_params.items()}
    for name in query:
        if name not in known:
            error = UsageError(f"{name} is an unknown field", nearest(name, known) or f"there are: {', '.join(known)}", param=name)
            error.code = "unknown_parameter"
            raise error
    for value in request.query_params.getlist("include") + request.query_params.getlist("include[]"):
        if value not in get_args(Includable):
            hint = nearest(value, get_args(Includable)) or f"there are: {', '.join(get_args(Includable))}"
            raise UsageError(f"include is {shown_value(value)}, which is nothing that can be included", hint, param="include")
    return query


def _page(items: list[dict[str, Any]], query: dict[str, str]) -> dict[str, Any]:
    """A page of a list of items, the newest first unless order says otherwise."""
    limit, order = query.get("limit", str(USUAL_ITEMS)), query.get("order", "desc")
    if not limit.isdecimal() or not 1 <= int(limit) <= MOST_ITEMS:
        raise UsageError(f"limit is {shown_value(limit)}; it must be between 1 and {MOST_ITEMS}", "give one in that range", param="limit")
    if order not in ("asc", "desc"):
        raise UsageError(f"order is {shown_value(order)}; it must be asc or desc", nearest(order, ("asc", "desc")), param="order")
    ordered = items if order == "asc" else items[::-1]
    if "after" in query:
        places = [place for place, item in enumerate(ordered) if item["id"] == query["after"]]
        if not places:
            raise UsageError(f"after is {shown_value(query['after'])}, which is none of the items", "give the id of one", param="after")
        ordered = ordered[places[0] + 1 :]
    page = ordered[: int(limit)]
    ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": None, "last_id": None}
    return {"object": "list", "data": page, "has_more": len(page) < len(ordered), **ends}
