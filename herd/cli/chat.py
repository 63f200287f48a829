"""Talk to a model in the terminal. @file in a message attaches an image; /clear forgets, /quit or Ctrl-D ends, Ctrl-C stops a reply."""

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from herd.chat import Image, Message, Sampling
from herd.engine.config import EngineConfig
from herd.engine.local import Model, load
from herd.errors import HerdError
from herd.log import log
from herd.text.images import read_image

IMAGE_ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """With stdin not a terminal, all of it is one message."""

    model: Annotated[Positional[str], arg(metavar="[MODEL]")] = "cria"  # a path to a checkpoint or a name
    system: str = ""  # what the model is told first
    sampling: Sampling = field(default_factory=Sampling)
    engine: EngineConfig = field(default_factory=EngineConfig)


def run(options: Options) -> int:
    start = [Message(role="system", content=(options.system,))] if options.system else []
    if not sys.stdin.isatty():
        asked = sys.stdin.read()
        if asked.strip():
            answer(load(options.model, config=options.engine), [*start, parse(asked)], options.sampling)
        else:
            log.info("stdin held no message, so there is nothing to answer")
        return 0
    model = load(options.model, config=options.engine)
    log.info("%s is ready. @file attaches an image, /clear forgets, /quit or Ctrl-D ends, Ctrl-C stops a reply.", model.name)
    import readline  # noqa: F401  arrow keys and history in input()

    messages = list(start)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return 0
        if line == "/quit":
            return 0
        if line == "/clear":
            messages = list(start)
        elif line:
            try:
                asked = [*messages, parse(line)]
                reply = answer(model, asked, options.sampling)
            except HerdError as error:  # a bad image or too long a talk is no reason to leave
                log.error("error: %s", error)
                continue
            messages = [*asked, Message(role="assistant", content=(reply,))]


def parse(line: str) -> Message:
    """A user message; each word @path that is a file becomes the image in it, in its place."""
    content: list[str | Image] = [""]
    for word in re.split(r"(\s+)", line.strip()):
        path = image_path(word)
        if path:
            content += [read_image(path), ""]
        else:
            content[-1] = f"{content[-1]}{word}"
    return Message(role="user", content=tuple(part for part in content if part))


def image_path(word: str) -> Path | None:
    """The file that @word names. Other words with an @ are names, as in mail."""
    if not word.startswith("@") or len(word) == 1:
        return None
    path = Path(word[1:])
    try:
        path = path.expanduser()
        is_file = path.is_file()
    except (OSError, RuntimeError):  # no such user, a name too long for a file
        is_file = False
    return path if is_file or path.suffix.lower() in IMAGE_ENDINGS else None


def answer(model: Model, messages: list[Message], sampling: Sampling) -> str:
    """Print one reply as it comes and give it back; Ctrl-C ends it early."""
    pieces = []
    reply = model.chat(messages, sampling=sampling)
    try:
        for piece in reply:
            print(piece, end="", flush=True)
            pieces.append(piece)
    except KeyboardInterrupt:
        reply.close()
    print()
    return "".join(pieces)
