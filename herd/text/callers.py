"""Messages and tools as callers of the Python API write them: dicts as in OpenAI's API, made into the words of chat.py."""

from dataclasses import fields
from typing import Any, cast

from herd.chat import Image, Message, Role, Tool, ToolCall, ToolChoice
from herd.errors import PromptError, UsageError
from herd.text.images import read_image


def read_choice(text: str) -> ToolChoice:
    """What a word says of calls: auto, none, required, or the name of the tool that must be called."""
    return ToolChoice(mode=cast(Any, text)) if text in ("auto", "none", "required") else ToolChoice(mode="required", names=(text,))


def read_tool(tool: Tool | dict[str, Any]) -> Tool:
    """A tool as the caller wrote it; dicts as in OpenAI's API. Raises `UsageError`."""
    if isinstance(tool, Tool):
        return tool
    match tool:
        case {"type": "function", "function": {"name": str(), **_other} as fields} if fields.keys() <= _TOOL_FIELDS:
            return Tool(**fields)
    hint = 'it must be {"type": "function", "function": {"name": ..., "description": ..., "parameters": ...}}'
    raise UsageError(f"a tool is {tool!r:.100}", hint, param="tools")


_TOOL_FIELDS = {f.name for f in fields(Tool)}


def read_message(message: Message | dict[str, Any]) -> Message:
    """A message as the caller wrote it; dicts as in OpenAI's API, with text, image_url, and image parts (a path, bytes or data URI)."""
    if isinstance(message, Message):
        return message
    if not isinstance(message, dict) or "role" not in message or not message.keys() <= _MESSAGE_KEYS:
        raise PromptError(f"a message is {message!r:.100}", 'it must be {"role": ..., "content": ...}, in a list')
    calls = tuple(map(_call, message.get("tool_calls") or ()))
    if not calls and "content" not in message:
        raise PromptError(f"a message is {message!r:.100}", "it has neither content nor calls")
    content = message.get("content")
    parts: list[str | Image] = []
    for part in [content] if isinstance(content, str) else content or ():
        match part:
            case str() | Image():
                parts.append(part)
            case {"type": "text", "text": str(text)}:
                parts.append(text)
            case {"type": "image_url", "image_url": {"url": str(url)}} | {"type": "image", "image": url}:
                parts.append(read_image(url))
            case _:
                raise PromptError(f"a part of a message is {part!r:.100}", "there are: text, image_url and image, as in OpenAI's API")
    role = cast(Role, message["role"])
    return Message(role=role, content=tuple(parts), tool_calls=calls, tool_call_id=message.get("tool_call_id"))


_MESSAGE_KEYS = {"role", "content", "tool_calls", "tool_call_id"}


def _call(call: Any) -> ToolCall:
    match call:
        case ToolCall():
            return call
        case {"id": str(call_id), "function": {"name": str(name), "arguments": str(text)}}:
            return ToolCall(id=call_id, name=name, arguments=text)
    hint = 'it must be {"id": ..., "type": "function", "function": {"name": ..., "arguments": "{...}"}}'
    raise PromptError(f"a call in a message is {call!r:.100}", hint, param="messages")
