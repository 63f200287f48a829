"""Talk to a model in the terminal. @file in a message attaches an image, /help lists the commands, Ctrl-C stops a reply, Ctrl-D ends."""

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated

from tyro.conf import FlagCreatePairsOff, Positional, arg

from herd.chat import Message, Sampling
from herd.checkpoint.store import home
from herd.cli.terminal.prompt import Asker, History
from herd.cli.terminal.said import parse
from herd.cli.terminal.screen import Painted, Plain
from herd.cli.terminal.talk import Quit, Talk, View
from herd.engine.config import EngineConfig
from herd.engine.local import load
from herd.errors import HerdError
from herd.log import log


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """With stdin not a terminal, all of it is one message. Replies are shown as Markdown in a terminal, and as they are in a pipe."""

    model: Annotated[Positional[str], arg(metavar="[MODEL]")] = "cria"  # a path to a checkpoint or a name
    system: str = ""  # what the model is told first
    plain: FlagCreatePairsOff[bool] = False  # replies as they are in a terminal too
    sampling: Sampling = field(default_factory=Sampling)
    engine: EngineConfig = field(default_factory=EngineConfig)


def run(options: Options) -> int:
    view = viewer(plain=options.plain)
    if not sys.stdin.isatty():
        return _answer_one(options, view)
    load_model = partial(load, config=options.engine)
    talk = Talk(load_model(options.model), options.sampling, options.system, view, load_model)
    log.info("%s is ready. /help lists the commands, Ctrl-C stops a reply, Ctrl-D ends.", talk.model.name)
    asker = Asker(History(home() / "chat_history"), talk.words)
    interrupts = 0
    while True:
        try:
            line = asker.ask()
            interrupts = 0
            talk.enter(line)
        except EOFError:
            print(file=sys.stderr)
            return 0
        except Quit:
            return 0
        except KeyboardInterrupt:  # at the prompt, or before a reply could begin
            interrupts += 1
            print(file=sys.stderr)
            if interrupts > 1:
                return 0
            log.info("Ctrl-C again ends%s", "; /retry asks again" if talk.unanswered else "")
        except HerdError as error:  # a bad image or too long a talk is no reason to leave
            log.error("error: %s%s", error, "\n/retry asks again" if talk.unanswered else "")
        except BrokenPipeError:
            raise
        except OSError as error:
            log.error("error: %s: %s", error.strerror or error, error.filename)


def viewer(*, plain: bool) -> Callable[[], View]:
    """Where replies go: painted as Markdown, or as they are where stdout is no terminal or one that can only print."""
    if plain or not sys.stdout.isatty() or os.environ.get("TERM", "dumb") in ("dumb", "unknown"):
        return partial(Plain, sys.stdout)
    from rich.console import Console

    console = Console(file=sys.stdout, force_terminal=True, highlight=False, legacy_windows=False)
    return partial(Painted, sys.stdout, console, shutil.get_terminal_size)


def _answer_one(options: Options, view: Callable[[], View]) -> int:
    asked = sys.stdin.read()
    if not asked.strip():
        log.info("stdin held no message, so there is nothing to answer")
        return 0
    start = [Message(role="system", content=(options.system,))] if options.system else []
    shown = view()
    for piece in load(options.model, config=options.engine).chat([*start, parse(asked)], sampling=options.sampling):
        shown.add(piece)
        shown.paint()
    shown.end()
    return 0
