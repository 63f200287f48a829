"""Reading what a user types: history that is kept, completion of paths and commands, messages of several lines.

With GNU readline a terminal marks what is pasted (bracketed paste), and it arrives whole, line feeds and all. Without that (libedit, an old
terminal) the lines come one by one, but at once: those that are there already when Enter was read belong to the same message.
"""

import json
import os
import re
import secrets
import select
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

from herd.log import log

KEPT = 1000  # messages in the history
_LONGEST = 65_536  # bytes of one that is kept
_PASTE_S = 0.02  # within which the next pasted line has come
_FENCE = '"""'

try:
    import readline as _readline
except ImportError:  # some builds of Python have none
    readline: ModuleType | None = None
else:
    readline = _readline


class History:
    """What was typed, in a file that only its owner can read: a line of JSON each, since a message may have several lines."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[str]:
        """The messages, the last one last; the file is shortened where it has grown. A broken line is left out."""
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
        except FileNotFoundError:
            return []
        kept = [text for text in map(_text_of, lines) if text][-KEPT:]
        if len(lines) > 2 * KEPT:
            beside = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}")
            self._write(beside, "".join(json.dumps(text) + "\n" for text in kept))
            beside.replace(self.path)
        return kept

    def add(self, text: str) -> None:
        line = json.dumps(text) + "\n"
        if len(line) <= _LONGEST:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._write(self.path, line)

    def _write(self, path: Path, text: str) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)


def _text_of(line: str) -> str | None:
    try:
        text = json.loads(line)
    except ValueError:
        return None
    return text if isinstance(text, str) else None


class Asker:
    """Asks for messages at a terminal."""

    def __init__(self, history: History, words: Callable[[str], Iterable[str]]) -> None:
        """words: what the beginning of a line may become, commands and their fields."""
        self._history, self._words = history, words
        self._found: list[str] = []
        if readline:
            self._set_up(readline)

    def _set_up(self, editor: ModuleType) -> None:
        editor.set_auto_history(False)
        try:
            for text in self._history.read():
                editor.add_history(text)
        except OSError as error:
            log.warning("the history cannot be read: %s", error)
        editor.set_completer_delims(" \t\n")
        editor.set_completer(self._complete)
        is_libedit = "libedit" in (editor.__doc__ or "")
        editor.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")
        if not is_libedit:
            editor.parse_and_bind("set enable-bracketed-paste on")

    def ask(self, mark: str = "> ") -> str:
        """The next message as it was typed; one between triple quotes, or with a backslash at the end of a line, has several lines.

        Raises `EOFError` at the end of the input, `KeyboardInterrupt` where the user takes back what was typed.
        """
        text = self._line(mark)
        if text.lstrip().startswith(_FENCE):
            text = text.lstrip()
            while len(text) < 2 * len(_FENCE) or not text.rstrip().endswith(_FENCE):
                text += "\n" + self._line(". ")
            text = text.rstrip()[len(_FENCE) : -len(_FENCE)].strip("\n")
        else:
            while text.endswith("\\"):
                text = text[:-1] + "\n" + self._line(". ")
        if text.strip():
            self._remember(text)
        return text

    def _line(self, mark: str) -> str:
        was_waiting = _is_waiting(0)
        text = _input(mark)
        while not was_waiting and _is_waiting(_PASTE_S):
            text += "\n" + _input("")
        return text

    def _remember(self, text: str) -> None:
        if readline:
            readline.add_history(text)
        try:
            self._history.add(text)
        except OSError as error:
            log.warning("the history cannot be kept: %s", error)

    def _complete(self, text: str, state: int) -> str | None:
        if state == 0 and readline:
            line = readline.get_line_buffer()[: readline.get_endidx()]
            self._found = completions(line, len(line) - len(text), self._words)
        return self._found[state] if state < len(self._found) else None


def _input(mark: str) -> str:
    if sys.stdout.isatty():
        return input(mark)
    sys.stderr.write(mark)  # what goes into the pipe is the replies alone
    sys.stderr.flush()
    return input()


def _is_waiting(timeout_s: float) -> bool:
    """Whether there is something to read: typed ahead, or pasted."""
    return bool(select.select([sys.stdin], [], [], timeout_s)[0])


def completions(line: str, start: int, words: Callable[[str], Iterable[str]]) -> list[str]:
    """What the word that begins at `start` may become: of a command, of a path after @ or after /save and /load. What stands before
    `start` stays, also where it is the first part of a path that holds spaces."""
    if match := re.fullmatch(r"(/(?:save!?|load) +)(.*)", line, re.DOTALL):
        return [path[start - len(match[1]) :] for path in _paths(match[2])]
    if match := re.search(r"""(?<!\S)@(["']?)((?:(?<=["'])[^"']*|\S*))$""", line):
        found = _paths(match[2])
        quote = match[1] or ('"' if any(" " in path for path in found) else "")
        whole = [f"@{quote}{path}{quote if not path.endswith('/') else ''}" for path in found]
        return [path[start - match.start() :] for path in whole]
    return [word[start:] for word in words(line)]


def _paths(beginning: str) -> list[str]:
    """The files and folders that begin so, folders with a slash."""
    folder, _, name = beginning.rpartition("/")
    shown = beginning[: len(beginning) - len(name)]
    try:
        where = Path(shown or ".").expanduser() if folder or not shown else Path("/")
        entries = sorted(where.iterdir())
    except (OSError, RuntimeError):
        return []
    matching = [entry for entry in entries if entry.name.startswith(name) and (name or not entry.name.startswith("."))]
    return [f"{shown}{entry.name}{'/' if entry.is_dir() else ''}" for entry in matching]
