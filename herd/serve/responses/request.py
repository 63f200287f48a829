"""From items to a request in herd's own words, and a request's own fields as its response tells them again."""

from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from herd.chat import ChatRequest, Format, Image, Message, Role, Tool, ToolCall, ToolChoice
from herd.errors import HerdError, UsageError
from herd.serve.request import Images, cache_salt, read_data_uri, sampling
from herd.serve.responses.schema import ChoiceForm, FormatForm, Item, Piece, ResponsesBody

# what the fields of a `ChatRequest` are called here
NAMES = {"max_tokens": "max_output_tokens", "messages": "input", "response_format": "text.format"}


@contextmanager
def in_words_of_responses() -> Iterator[None]:
    """Errors from below name the fields of this API."""
    try:
        yield
    except HerdError as error:
        error.param = NAMES.get(error.param or "", error.param)
        raise


def with_pictures(body: ResponsesBody, images: Images) -> ResponsesBody:
    """The body with the images that were fetched in place of their addresses, which may lead elsewhere when the conversation goes on."""

    def pieces(given: Sequence[Piece] | None) -> list[Piece] | None:
        return None if given is None else [piece.model_copy(update=picture(piece)) for piece in given]

    def picture(piece: Piece) -> dict[str, str]:
        image = images.get(piece.image_url or "")
        return {} if image is None else {"image_url": f"data:image/*;base64,{b64encode(image.data).decode()}"}

    if not images:
        return body
    items = [item.model_copy(update={"content": pieces(item.content), "output": pieces(item.output)}) for item in body.input]
    return body.model_copy(update={"input": items})


def given_items(body: ResponsesBody, past: Sequence[Item], find: Callable[[str, str], Item]) -> list[Item]:
    """The body's items, references replaced by what they stand for. Raises `UsageError` for an item that is there twice.

    past: items of the conversation so far.  find: the stored item of an id; it is told which field asks.
    """
    known = {item.id for item in past}
    found: list[Item] = []
    for place, item in enumerate(body.input):
        if item.id is not None and item.id in known:
            hint = "with previous_response_id, send only what is new" if past else "send each item once"
            raise UsageError(f"input.{place}.id is {item.id!r}, an item that the conversation has already", hint, param=f"input.{place}.id")
        known.add(item.id)
        found.append(find(item.id or "", f"input.{place}.id") if item.type == "item_reference" else item)
    return found


def chat_request(body: ResponsesBody, past: Sequence[Item], new: Sequence[Item], caller: tuple[str, ...]) -> ChatRequest:
    """What a body asks for. Raises `UsageError`."""
    places = [*(("input", item) for item in past), *((f"input.{place}", item) for place, item in enumerate(new))]
    own = [Message(role="system", content=(body.instructions,))] if body.instructions else []
    form = _format(body.format)
    return ChatRequest(
        model=body.model,
        messages=(*own, *messages(places)),
        sampling=sampling(
            body,
            max_tokens=body.max_output_tokens,
            logprobs=(body.top_logprobs or 0) if body.with_logprobs else None,
            **({"format": form} if form else {}),
        ),
        cache_salt=cache_salt(body, caller),
        tools=tuple(
            Tool(name=tool.name, description=tool.description or "", parameters=tool.parameters or {}, strict=bool(tool.strict))
            for tool in body.tools or ()
        ),
        tool_choice=_choice(body.tool_choice, parallel=body.parallel_tool_calls is not False),
    )


def messages(items: Iterable[tuple[str, Item]]) -> list[Message]:
    """A conversation, each item with its place in the request. Calls belong to the assistant's message before them.

    A call that the token limit cut off was never made, and is left out. Raises `UsageError` for a call without its output, or the other
    way round.
    """
    made: list[Message] = []
    waiting: dict[str, Item] = {}  # calls without their output, by call_id

    def all_are_answered() -> None:
        for call in waiting.values():
            hint = f"give an item of type function_call_output with call_id {call.call_id!r}"
            raise UsageError(f"there is no output for the call {call.call_id!r} of {call.name}", hint, param="input")

    for where, item in items:
        if item.type == "function_call":
            if item.status == "incomplete":
                continue
            if item.call_id in waiting:
                raise UsageError(f"{where}.call_id is {item.call_id!r} a second time", "give each call its own", param=f"{where}.call_id")
            waiting[item.call_id or ""] = item
            call = ToolCall(id=item.call_id or "", name=item.name or "", arguments=item.arguments or "")
            before = made.pop() if made and made[-1].role == "assistant" else Message(role="assistant", content=())
            made.append(Message(role="assistant", content=before.content, tool_calls=(*before.tool_calls, call)))
        elif item.type == "function_call_output":
            if waiting.pop(item.call_id or "", None) is None:
                text = f"{where}.call_id is {item.call_id!r}, and no call with that id waits for its output"
                raise UsageError(text, "send the call before it, or previous_response_id", param=f"{where}.call_id")
            made.append(Message(role="tool", content=_content(item.output or (), f"{where}.output"), tool_call_id=item.call_id))
        else:
            all_are_answered()
            assert item.role is not None
            role: Role = "system" if item.role == "developer" else item.role
            made.append(Message(role=role, content=_content(item.content or (), f"{where}.content")))
    all_are_answered()
    return made


def _content(pieces: Sequence[Piece], where: str) -> tuple[str | Image, ...]:
    return tuple(
        read_data_uri(piece.image_url, f"{where}.{place}.image_url") if piece.image_url is not None else piece.text or piece.refusal or ""
        for place, piece in enumerate(pieces)
    )


def _format(form: FormatForm) -> Format | None:
    if form.type == "json_schema":
        return Format(kind="json_schema", value=form.schema_, strict=bool(form.strict))
    return Format(kind="json_object") if form.type == "json_object" else None


def _choice(choice: ChoiceForm | None, *, parallel: bool) -> ToolChoice:
    if choice is None:
        return ToolChoice(parallel=parallel)
    if choice.type == "function":
        return ToolChoice(mode="required", names=(choice.name or "",), parallel=parallel)
    if choice.type == "allowed_tools":
        return ToolChoice(mode=choice.mode or "auto", names=tuple(tool.name for tool in choice.tools or ()), parallel=parallel)
    return ToolChoice(mode=choice.type, parallel=parallel)


def head(body: ResponsesBody, *, is_stored: bool) -> dict[str, Any]:
    """What a response tells again of its request."""
    choice = body.tool_choice
    return {
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "metadata": body.metadata or {},
        "model": body.model,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": is_stored,
        "temperature": body.temperature,  # null where it was not given: the model's makers' advice holds
        "text": {"format": body.format.model_dump(exclude_none=True, by_alias=True), "verbosity": "medium"},
        "tool_choice": "auto" if choice is None else choice.model_dump(exclude_none=True) if choice.name or choice.tools else choice.type,
        "tools": [
            {"type": "function", "name": t.name, "description": t.description, "parameters": t.parameters, "strict": bool(t.strict)}
            for t in body.tools or ()
        ],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": body.top_p,
        "truncation": "disabled",
        "user": body.user,
    }
