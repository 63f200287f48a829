"""Servers in processes of their own: the command as people start it, and functions in forks.

Forks are those of one process that has imported torch and herd, so that tests pay for that once and not two seconds each. It starts no
thread before it forks, and a fork ends as a program does, with its interpreter.
"""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.clock import until

ROOT = Path(__file__).parents[1]
ADDRESS = re.compile(r"(http://127\.0\.0\.1:\d+)\s|(http://127\.0\.0\.1:\d+)/v1")
START_S = 120.0  # a bound, not a wait
PRELOADED = ("herd.cli.main", "herd.cli.serve", "herd.engine.local", "herd.serve.app", "tests.serve.echo", "pytest", "httpx2")


def address(text: str) -> str:
    """The first that a server has told, or nothing yet."""
    found = ADDRESS.search(text)
    return (found[1] or found[2]) if found else ""


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`herd serve ...`, and its address. It is ended by Ctrl-C, in good order."""
    command = [sys.executable, "-m", "herd.cli.main", "serve", *arguments, "--port", "0"]
    with tempfile.TemporaryDirectory() as folder:
        out, err = (Path(folder) / name for name in ("out", "err"))
        with out.open("wb") as to_out, err.open("wb") as to_err, subprocess.Popen(command, stdout=to_out, stderr=to_err) as process:
            try:
                assert until(lambda: bool(address(out.read_text())) or process.poll() is not None, START_S), err.read_text()
                assert process.poll() is None, err.read_text()
                yield process, address(out.read_text())
                process.send_signal(signal.SIGINT)
                assert process.wait(30) in (0, 130), err.read_text()
            finally:
                process.kill()


class Fork:
    """A function that runs in a process of its own."""

    def __init__(self, forks: "Forks", pid: int, out: Path, err: Path) -> None:
        self.forks, self.pid, self._out, self._err = forks, pid, out, err
        self._code: int | None = None

    def poll(self) -> int | None:
        """Its exit code, once it has ended; that of a signal is negative."""
        if self._code is None:
            self._code = self.forks.ask({"poll": self.pid})
        return self._code

    def wait(self, seconds: float = 30.0) -> int:
        assert until(lambda: self.poll() is not None, seconds), f"it goes on: {self.err}"
        assert self._code is not None
        return self._code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
        self.wait()

    @property
    def out(self) -> str:
        """What it has written to stdout."""
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    @property
    def url(self) -> str:
        """The address that it tells; waits for it."""
        assert until(lambda: bool(address(self.out)) or self.poll() is not None, START_S) and self.poll() is None, self.err
        return address(self.out)


class Forks:
    """Starts them, each in a session of its own, with what it writes in files of `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._number = folder, 0
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        command = [sys.executable, "-m", "tests.processes"]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert self.ask({}) == "ready"

    def ask(self, request: dict[str, Any]) -> Any:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    @contextmanager
    def run(self, function: str, *arguments: Any, **environment: str) -> Iterator[Fork]:
        """`function` ("package.module:name") of arguments that JSON can hold, with its result as exit code; killed at the end."""
        self._number += 1
        out, err = (self.folder / f"{self._number}.{name}" for name in ("out", "err"))
        request = {"function": function, "arguments": arguments, "environment": environment, "out": str(out), "err": str(err)}
        fork = Fork(self, self.ask(request), out, err)
        try:
            yield fork
        finally:
            fork.kill()

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


def _poll(pid: int) -> int | None:
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def _become(request: dict[str, Any]) -> Any:
    """In the fork: what runs from here on has nothing of the process that it came from but its modules."""
    os.setsid()
    files = (os.devnull, os.O_RDONLY), (request["out"], os.O_WRONLY | os.O_APPEND), (request["err"], os.O_WRONLY | os.O_APPEND)
    for descriptor, (path, flags) in enumerate(files):
        opened = os.open(path, flags)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.update(request["environment"])
    module, _, name = request["function"].partition(":")
    return getattr(importlib.import_module(module), name)(*request["arguments"])


def _main() -> Any:
    for name in PRELOADED:
        importlib.import_module(name)
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        answer: Any = "ready"
        if "poll" in request:
            answer = _poll(request["poll"])
        elif "function" in request:
            for key in ("out", "err"):
                Path(request[key]).touch()
            answer = os.fork()
            if answer == 0:
                return _become(request)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(_main())
