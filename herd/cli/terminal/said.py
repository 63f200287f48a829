"""What a user types, as a message: words, and images where @file stands."""

import re
from pathlib import Path

from herd.chat import Image, Message
from herd.text.images import read_image

IMAGE_ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}

_AT = re.compile(r"""(?<!\S)@(?:"([^"\n]+)"|'([^'\n]+)'|((?:\\.|\S)+))""")
_BEHIND = ".,;:!?)"  # marks that may follow a name without a space


def parse(line: str) -> Message:
    """A user message; each @path that is a file becomes the image in it, in its place. Paths with spaces stand in quotes, or with \\ before
    each. Raises `PromptError` for what is meant as an image and cannot be read."""
    content: list[str | Image] = [""]
    line, at = line.strip(), 0
    for match in _AT.finditer(line):
        path, length = _path(match)
        if path:
            content[-1] = f"{content[-1]}{line[at : match.start()]}"
            content += [read_image(path), ""]
            at = match.start() + length
    content[-1] = f"{content[-1]}{line[at:]}"
    return Message(role="user", content=tuple(part for part in content if part))


def _path(match: re.Match[str]) -> tuple[Path | None, int]:
    """The file that a match names, and how many characters name it. Other words with an @ are names, as in mail."""
    length = len(match[0])
    if match[3] is None:
        return image_path(match[1] or match[2]), length
    for word in (match[3], match[3].rstrip(_BEHIND)):
        if path := image_path(re.sub(r"\\(.)", r"\1", word)):
            return path, 1 + len(word)
    return None, length


def image_path(name: str) -> Path | None:
    """The file of that name, or one that was meant: a missing one with the ending of an image."""
    if not name:
        return None
    path = Path(name)
    try:
        path = path.expanduser()
        is_file = path.is_file()
    except (OSError, RuntimeError, ValueError):  # no such user, a name too long for a file, a zero byte
        is_file = False
    return path if is_file or path.suffix.lower() in IMAGE_ENDINGS else None
