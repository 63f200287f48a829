"""`herd chat` as somebody at a terminal meets it: a real pty, and pyte for the screen."""

import fcntl
import json
import os
import pty
import select
import stat
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pyte
import pytest

from herd.chat import Image, Message
from herd.cli.terminal.prompt import KEPT, History, completions
from herd.cli.terminal.said import parse
from herd.cli.terminal.talk import FIELDS, Talk, read_value
from herd.cli.terminal.transcript import load, save
from herd.errors import HerdError, UsageError

ROOT = Path(__file__).parent.parent.parent
WAIT_S = 60.0  # a bound, not a wait


class Seat:
    """A place at the terminal."""

    def __init__(self, home: Path, replies: list[tuple[str, float]], *options: str, columns: int = 70, rows: int = 24) -> None:
        environment = {**os.environ, "HERD_HOME": str(home), "TERM": "xterm-256color", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.screen = pyte.HistoryScreen(columns, rows, history=2000)
        self.stream = pyte.ByteStream(self.screen)
        self.raw, self.mark = b"", 0
        own, self.theirs = pty.openpty()
        fcntl.ioctl(own, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.terminal = own
        command = [sys.executable, "-m", "tests.cli.scripted_chat", json.dumps(replies), *options]
        take = lambda: (os.setsid(), fcntl.ioctl(0, termios.TIOCSCTTY, 0))  # noqa: E731
        self.child = subprocess.Popen(
            command, cwd=home, env=environment, stdin=self.theirs, stdout=self.theirs, stderr=self.theirs, preexec_fn=take
        )
        os.close(self.theirs)

    def expect(self, text: str, limit_s: float = WAIT_S) -> None:
        """Wait until the text has come, after what was expected last."""
        end = time.monotonic() + limit_s
        while (found := self.raw.find(text.encode(), self.mark)) < 0:
            assert time.monotonic() < end, f"{text!r} did not come; the screen is\n{self.shown}"
            self._read(0.2)
        self.mark = found + len(text.encode())

    def _read(self, timeout_s: float) -> bool:
        if not select.select([self.terminal], [], [], timeout_s)[0]:
            return False
        try:
            data = os.read(self.terminal, 65536)
        except OSError:  # the other side is closed
            return False
        self.raw += data
        self.stream.feed(data.replace(b"\x1b[?2026h", b"").replace(b"\x1b[?2026l", b""))
        return bool(data)

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def ask(self, text: str) -> str:
        """Type a line and give what stands between it and the next prompt."""
        start = self.mark
        self.type(f"{text}\r")
        self.expect("\x1b[?2004h> ")  # readline is ready
        return self.raw[start : self.mark].decode()

    def end(self) -> int:
        """The exit code, once all that was written has been read."""
        end = time.monotonic() + WAIT_S
        while self.child.poll() is None and time.monotonic() < end:
            self._read(0.1)
        while self._read(0):
            pass
        return self.child.wait(1)

    @property
    def shown(self) -> str:
        scrolled = ["".join(line[i].data for i in range(self.screen.columns)) for line in self.screen.history.top]
        return "\n".join(line.rstrip() for line in [*scrolled, *self.screen.display]).rstrip()


@pytest.fixture
def sit(tmp_path: Path) -> Iterator[Callable[..., Seat]]:
    seats: list[Seat] = []

    def take(*args: Any) -> Seat:
        seats.append(Seat(tmp_path, *args))
        seats[-1].expect("\x1b[?2004h> ")
        return seats[-1]

    yield take
    for seat in seats:
        if seat.child.poll() is None:
            seat.child.kill()
            seat.child.wait()
        os.close(seat.terminal)


def said(path: Path) -> list[tuple[str, str]]:
    return [(message.role, message.text) for message in load(path)]


def test_a_conversation(sit: Callable[..., Seat], tmp_path: Path) -> None:
    PIL.Image.new("RGB", (8, 8), "red").save(tmp_path / "my red.png")
    replies = [("**Hello** \x1b]0;owned\x07\x1b[31mthere\n\n- a\n- b\n", 0.0), ("word " * 60, 0.05), ("Second.", 0.0), ("Third.", 0.0)]
    seat = sit(replies)
    first = seat.ask("hi")
    assert "\x1b]0" not in first and "\x1b[31m" not in first and "\x1b[1mHello" in first
    assert "Hello ␛]0;owned␇␛[31mthere\n\n• a\n• b\n\n> " in seat.shown + " "
    # Ctrl-C ends the reply and nothing else; what was said is kept
    seat.type('look at @"my red.png" please\r')
    seat.expect("word word ")
    seat.type("\x03")
    seat.expect("stopped; what was said is kept")
    seat.expect("\x1b[?2004h> ")
    assert "4 messages saved" in seat.ask("/save talk.json")
    talk = said(tmp_path / "talk.json")
    assert talk[:3] == [("user", "hi"), ("assistant", replies[0][0]), ("user", "look at  please")]
    assert talk[3][1].startswith("word word") and len(talk[3][1]) < len(replies[1][0])
    [image] = [part for part in load(tmp_path / "talk.json")[2].content if isinstance(part, Image)]
    assert image.data == (tmp_path / "my red.png").read_bytes()
    # another reply, then back
    seat.ask("/retry")
    assert "exists" in seat.ask("/save talk.json") and said(tmp_path / "talk.json") == talk
    seat.ask("/save! talk.json")
    assert said(tmp_path / "talk.json") == [*talk[:3], ("assistant", "Second.")]
    assert "left are 2 messages" in seat.ask("/undo")
    assert "4 messages loaded" in seat.ask("/load talk.json")
    assert "back are 2 messages" in seat.ask("/undo")
    seat.ask("/load talk.json")
    seat.ask("/save again.json")
    assert (tmp_path / "again.json").read_text() == (tmp_path / "talk.json").read_text()
    # what fails loses nothing
    assert "this does not fit" in seat.ask("x" * 3000)
    assert "@" not in seat.ask("/undo") and "4 messages saved" in seat.ask("/save three.json")
    assert "there is no image file" in seat.ask("see @none.png")
    assert "did you mean stats?" in seat.ask("/stat")
    assert "temperature is 9" in seat.ask("/set temperature 9") and "temperature is 0.5" in seat.ask("/set temperature 0.5")
    assert "forgotten are 4 messages" in seat.ask("/clear")
    seat.ask("/system Be brief.")
    seat.ask("more")
    stats = seat.ask("/stats")
    assert "a second; the first after" in stats and "2 messages" in stats
    seat.ask("/save talk.md")
    assert (tmp_path / "talk.md").read_text() == "## System\n\nBe brief.\n\n## You\n\nmore\n\n## tiny\n\nThird.\n"
    seat.type("/quit\r")
    assert seat.end() == 0


def test_typing(sit: Callable[..., Seat], tmp_path: Path) -> None:
    """Lines that belong together, what is pasted, history over runs, keys that end."""
    history = tmp_path / "chat_history"
    history.write_text(json.dumps("from before") + "\nbroken\n" + json.dumps("two\nlines") + "\n")
    (tmp_path / "some file.png").write_bytes(b"x")
    seat = sit([("One.", 0.0), ("Two.", 0.0), ("Three.", 0.0), ("Four.", 0.0)])
    seat.type("\x1b[A\x1b[A\r")
    seat.expect("One.")
    seat.expect("\x1b[?2004h> ")
    seat.type("\x1b[200~pasted\nlines\n/quit\x1b[201~")
    time.sleep(0.3)
    seat.ask("")
    seat.type('"""\r')
    seat.expect(". ")
    seat.type("a\r")
    seat.expect(". ")
    seat.ask('b\\"""')
    seat.type("c\\\r")
    seat.expect(". ")
    seat.ask("d")
    seat.ask("/sa\tall.json")  # completed
    talk = [text for role, text in said(tmp_path / "all.json") if role == "user"]
    assert talk == ["from before", "pasted\nlines\n/quit", "a\nb\\", "c\nd"]
    assert "no image of a known kind" in seat.ask("@so	")  # the path was completed, in quotes
    assert '@"some file.png"' in seat.shown
    seat.type("half a line\x03")
    seat.expect("again ends")
    seat.expect("\x1b[?2004h> ")
    seat.type("\x03")
    assert seat.end() == 0
    kept = [json.loads(line) for line in history.read_text().split("\n")[3:-1]]
    assert kept[:4] == ["from before", "pasted\nlines\n/quit", "a\nb\\", "c\nd"] and "half a line" not in kept


def test_end_of_input_and_a_terminal_that_can_only_print(sit: Callable[..., Seat]) -> None:
    seat = sit([("**bold**", 0.0)], "--plain")
    assert "**bold**" in seat.ask("hi")
    seat.type("\x04")
    assert seat.end() == 0


def run(home: Path, replies: list[tuple[str, float]], **named: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.cli.scripted_chat", json.dumps(replies)]
    environment = {**os.environ, "HERD_HOME": str(home), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **named)


def test_pipes(tmp_path: Path) -> None:
    """In a pipe a reply is as it is, but for control characters; who reads no more ends it."""
    whole, cut = run(tmp_path, [("**Hé** \x1b[31m|\n\n```\n", 0.0)]), run(tmp_path, [("word " * 100, 0.005)])
    out, err = whole.communicate(b"hi", WAIT_S)
    assert (whole.returncode, out.decode(), err) == (0, "**Hé** ␛[31m|\n\n```\n", b"")
    assert cut.stdin and cut.stdout and cut.stderr
    cut.stdin.write(b"hi")
    cut.stdin.close()
    assert cut.stdout.read(4) == b"word"
    cut.stdout.close()
    assert (cut.wait(WAIT_S), cut.stderr.read()) == (0, b"")
    cut.stderr.close()


def test_history_is_private_and_bounded(tmp_path: Path) -> None:
    history = History(tmp_path / "home" / "history")
    assert history.read() == []
    for i in range(2 * KEPT + 1):
        history.add(f"message {i}")
    history.add("x" * 100_000)
    assert stat.S_IMODE(history.path.stat().st_mode) == 0o600
    assert history.read()[0] == f"message {KEPT + 1}" and len(History(history.path).read()) == KEPT
    assert len(history.path.read_text().split("\n")) == KEPT + 1 and stat.S_IMODE(history.path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("a @{}/one.png b", ["one.png"]),
        ('@"{}/a b.png"', ["a b.png"]),
        ("@'{}/a b.png', and @{}/one.png.", ["a b.png", "one.png"]),
        (r"@{}/a\ b.png what?", ["a b.png"]),
        ("(@{}/one.png me@{}/one.png", []),
    ],
)
def test_images_in_a_message(tmp_path: Path, line: str, names: list[str]) -> None:
    for name in ("one.png", "a b.png"):
        (tmp_path / name).write_bytes(name.encode())
    message = parse(line.replace("{}", str(tmp_path)))
    assert [part.data.decode() for part in message.content if isinstance(part, Image)] == names
    if names == ["a b.png", "one.png"]:
        assert [part for part in message.content if isinstance(part, str)] == [", and ", "."]


def test_completions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("my one.png", "my two.png", "other.json"):
        Path(name).touch()
    Path("folder").mkdir()
    words = Talk.words
    for line, start, found in [
        ("/st", 0, ["/stats"]),
        ("/set temp", 5, ["temperature "]),
        ("/save o", 6, ["other.json"]),
        ("see @f", 4, ["@folder/"]),
        ("see @oth", 4, ["@other.json"]),
        ("see @my", 4, ['@"my one.png"', '@"my two.png"']),
        ('see @"my t', 9, ['two.png"']),
        ("see me@my", 4, []),
        ("hello", 0, []),
    ]:
        assert completions(line, start, lambda text: words(None, text)) == found, line  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("temperature", "0.3", 0.3),
        ("seed", "none", None),
        ("stop", "###", ("###",)),
        ("stop", '["a", "b"]', ("a", "b")),
        ("logit_bias", '{"3": -1}', {3: -1}),
    ],
)
def test_values_of_fields(name: str, text: str, value: object) -> None:
    assert name in FIELDS and read_value(name, text) == value


PASSWORDS = "/etc/passwd"


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[1]",
        '{"messages": 1}',
        '[{"role": "user"}]',
        '[{"role": "tool", "content": "x", "tool_call_id": "1"}]',
        json.dumps([{"role": "user", "content": [{"type": "image", "image": PASSWORDS}]}]),
        json.dumps([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": PASSWORDS}}]}]),
    ],
)
def test_files_that_hold_no_conversation(tmp_path: Path, text: str) -> None:
    (tmp_path / "talk.json").write_text(text)
    with pytest.raises(HerdError):
        load(tmp_path / "talk.json")


def test_a_file_that_exists_stays(tmp_path: Path) -> None:
    messages = [Message(role="user", content=("a", Image(data=b"GIF8x"), "b"))]
    path = tmp_path / "talk.json"
    save(path, messages, "m")
    assert load(path) == messages and json.loads(path.read_text())["messages"][0]["content"][1]["image_url"]["url"].startswith(
        "data:image/gif"
    )
    with pytest.raises(UsageError, match="exists"):
        save(path, [], "m")
    save(path, [], "m", overwrite=True)
    assert load(path) == []
    with pytest.raises(UsageError, match=r"\.txt"):
        save(tmp_path / "talk.txt", [], "m")
