"""A conversation as a file: JSON, which can be loaded again, or Markdown, to be read.

The JSON is an object with `messages` as OpenAI's API has them, images as data: URIs; a bare list of such messages is read too.
"""

import base64
import json
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from herd.chat import Image, Message
from herd.errors import PromptError, UsageError
from herd.text.callers import read_message
from herd.text.images import from_data_uri

_KINDS = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"RIFF": "webp", b"GIF8": "gif", b"BM": "bmp", b"II*": "tiff", b"MM\0": "tiff"}
_ENDINGS = "name it with .json, which can be loaded again, or with .md"


def save(path: Path, messages: Sequence[Message], model: str, *, overwrite: bool = False) -> None:
    """Write the conversation in the form that the file's ending names. Raises `UsageError`, also where the file exists, and `OSError`."""
    match path.suffix.lower():
        case ".json":
            text = json.dumps({"model": model, "messages": [wire(message) for message in messages]}, indent=2, ensure_ascii=False) + "\n"
        case ".md":
            text = "\n".join(_markdown(message, model) for message in messages)
        case other:
            raise UsageError(f"a conversation cannot be saved as {other or path.name!r}", _ENDINGS)
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists", f"choose another name, or overwrite it: /save! {path}")
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def load(path: Path) -> list[Message]:
    """The messages of a JSON file. Raises `UsageError`, `PromptError` or `OSError`."""
    if path.suffix.lower() == ".md":
        raise UsageError(f"{path} is Markdown, which cannot be loaded", "save conversations as .json to load them again")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no JSON: {error}", "give a file that /save has written") from error
    listed = found.get("messages") if isinstance(found, dict) else found
    if not isinstance(listed, list) or not all(isinstance(message, dict) for message in listed):
        raise UsageError(f"{path} holds no list of messages", 'give {"messages": [{"role": "user", "content": "..."}, ...]}')
    return [_read(message) for message in listed]


def wire(message: Message) -> dict[str, Any]:
    """A message as OpenAI's API has it."""
    if all(isinstance(part, str) for part in message.content):
        return {"role": message.role, "content": message.text}
    return {"role": message.role, "content": [_part(part) for part in message.content]}


def _part(part: str | Image) -> dict[str, Any]:
    return {"type": "text", "text": part} if isinstance(part, str) else {"type": "image_url", "image_url": {"url": _uri(part)}}


def _uri(image: Image) -> str:
    kind = next((kind for start, kind in _KINDS.items() if image.data.startswith(start)), "png")
    return f"data:image/{kind};base64,{base64.b64encode(image.data).decode()}"


def _read(message: dict[str, Any]) -> Message:
    content = message.get("content")
    if not isinstance(content, str | list):
        raise PromptError(f"the content of a message is {content!r:.40}", "give a text, or a list of parts")
    parts = [_opened(part) for part in content] if isinstance(content, list) else content
    read = read_message({**message, "content": parts})
    if read.role not in ("system", "user", "assistant"):
        raise PromptError(f"a message has the role {read.role!r:.40}", "there are: system, user, assistant")
    return read


def _opened(part: Any) -> Any:
    """Images from the file alone: a conversation of somebody else must not choose files of this machine."""
    match part:
        case {"type": "image_url", "image_url": {"url": str(url)}}:
            return from_data_uri(url)
        case {"type": "text", "text": str(text)}:
            return text
    raise PromptError(f"a part of a message is {part!r:.60}", "there are text and image_url, with a data: URI")


def _markdown(message: Message, model: str) -> str:
    title = {"user": "You", "assistant": model, "system": "System"}.get(message.role, message.role)
    parts = [part if isinstance(part, str) else f"![image]({_uri(part)})" for part in message.content]
    return f"## {title}\n\n{''.join(parts).strip()}\n"
