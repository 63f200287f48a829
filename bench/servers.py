"""What the benches of servers share: herd's and llama.cpp's as processes of their own, and a client that streams replies from either."""

import asyncio
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

START_S = 120  # that a server gets to load its model


@dataclass(frozen=True, slots=True)
class Reply:
    """One streamed reply as its reader saw it."""

    sent_s: float  # on the clock of `time.perf_counter`
    pieces_s: list[float] = field(default_factory=list)  # when each piece of text came
    texts: list[str] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)  # OpenAI's object

    @property
    def first_s(self) -> float:
        """From sending to the first piece of text."""
        return self.pieces_s[0] - self.sent_s

    @property
    def gaps_s(self) -> list[float]:
        """Between one piece and the next."""
        return [b - a for a, b in zip(self.pieces_s, self.pieces_s[1:], strict=False)]


class Server:
    """A process that answers on a port of this machine."""

    def __init__(self, name: str, command: list[str], port: int) -> None:
        self.name, self.command, self.port = name, command, port
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # what ends the bench must end its servers too
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        start = time.perf_counter()
        while not self._answers():
            if self._process.poll() is not None or time.perf_counter() - start > START_S:
                self.close()
                sys.exit(f"error: {' '.join(command)} does not answer\nhint: run it by hand and read what it prints")
            time.sleep(0.05)
        self.start_s = time.perf_counter() - start

    def _answers(self) -> bool:
        try:
            return self.get("/health")[0] == 200
        except OSError:
            return False

    def get(self, path: str, body: dict[str, Any] | None = None, timeout_s: float = 600) -> tuple[int, bytes]:
        """Status and body; a POST where there is a body to send."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)) as connection:
            sent = None if body is None else json.dumps(body)
            connection.request("GET" if body is None else "POST", path, sent, {"content-type": "application/json"})
            reply = connection.getresponse()
            return reply.status, reply.read()

    def cpu_s(self) -> float:
        """CPU seconds that the process has used so far."""
        words = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")

    def resident_bytes(self) -> int:
        """Memory that the process holds now."""
        return int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def close(self) -> None:
        """End the process and wait for it."""
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def herd(model: str, threads: int, *choices: str) -> Server:
    """`herd serve`; choices: more of its options."""
    port = free_port()
    return Server("herd", [sys.executable, "-m", "herd.cli.main", "serve", model, f"--port={port}", f"--threads={threads}", *choices], port)


def llama_cpp(binary: str, gguf: str, threads: int, *choices: str) -> Server:
    """llama.cpp's `llama-server`; choices: more of its options."""
    port = free_port()
    command = [binary, "-m", gguf, "--host", "127.0.0.1", "--port", str(port), "-t", str(threads), "-tb", str(threads), *choices]
    return Server("llama.cpp", command, port)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def stream(port: int, body: dict[str, Any], leave_after: int | None = None) -> Reply:
    """POST a chat completion and read its events. By hand, and looked into only when all have come, since the client runs on the cores that
    the servers are measured on.

    leave_after: pieces of text after which the reader is gone; None: it stays to the end.
    """
    sent = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
    reply = Reply(time.perf_counter())
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: {len(sent)}\r\n\r\n"
    writer.write(head.encode() + sent)
    pieces: list[tuple[float, bytes]] = []
    num_texts, tail = 0, b""
    try:
        status = await reader.readline()
        assert b" 200 " in status, status + await reader.read(1000)
        while (await reader.readline()).strip():  # headers
            pass
        while leave_after is None or num_texts < leave_after:
            piece = await reader.read(1 << 16)
            assert piece, "the server hung up in mid-reply"
            pieces.append((time.perf_counter(), piece))
            num_texts += piece.count(b'"content":"') - piece.count(b'"content":""')
            tail = (tail + piece)[-7:]
            if tail == b"\r\n0\r\n\r\n":  # the last of the chunks in which the body comes
                break
    finally:
        writer.close()
    for moment, event in _events(pieces):
        if not event.startswith(b"data: {"):
            continue
        item = json.loads(event[6:])
        assert "error" not in item, item
        text = item["choices"][0]["delta"].get("content") if item["choices"] else None
        if text:
            reply.pieces_s.append(moment)
            reply.texts.append(text)
        reply.usage.update(item.get("usage") or {})
    return reply


def _events(pieces: list[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """The whole events of a body in chunks, each with the moment at which its last byte came. pieces: of the body, as they came."""
    if not pieces:
        return
    raw = b"".join(piece for _, piece in pieces)
    arrivals = ((end, moment) for end, (moment, _) in zip(accumulate(len(piece) for _, piece in pieces), pieces, strict=True))
    end, moment = next(arrivals)
    at, rest = 0, b""
    while (begin := raw.find(b"\r\n", at) + 2) > 1 and (size := int(raw[at : begin - 2], 16)) and begin + size <= len(raw):
        at = begin + size + 2
        while end < at - 2:
            end, moment = next(arrivals)
        *events, rest = (rest + raw[begin : begin + size]).split(b"\n\n")
        for event in events:
            yield moment, event
