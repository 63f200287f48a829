#!/usr/bin/env python3
"""Do replies keep their pace while a very long prompt comes in, and how soon does a short one get its first token meanwhile?

usage: mix.py [--server LLAMA-SERVER] [--tokens 100000] [--chats 8] [--cpu-time] [--save]

Both sides are servers and read over HTTP, each alone on the machine, one after the other, with the same weights and threads. Some chats
write without end. After a while alone a long prompt comes in, and every few seconds a short one; when the long one has its first token the
chats are alone again. The promise is kept if each chat's tokens per second meanwhile are 70 % of what they were alone, before and after
(contexts grow, so the mean of the two), and no gap between two of its tokens is longer than five times the median gap.

With --cpu-time herd's engine runs in this process on one thread and steps are timed, and paced, by the processor's time: neighbours on the
machine do not count. There are no short prompts then.

The model has random int4 weights: 4 layers of Cria's width with 4 experts, one of them global, chunks of 8,192, the vocabulary of Llama 4.
Only the logits of ASCII characters are not 0, so that each token is a character and comes as an event of its own.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import datetime
import itertools
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import torch
from slice import write_random
from versus import HERE, cpu

from herd.chat import Sampling
from herd.checkpoint.convert import write
from herd.checkpoint.load import open_model
from herd.engine.config import EngineConfig
from herd.engine.opening import open_engine
from herd.engine.sequence import Sequence
from herd.log import log, show_logs
from herd.model.presets import CRIA
from herd.text.prompt import Prompt
from herd.text.tokenizer import byte_tokenizer

MODEL = dataclasses.replace(
    CRIA,
    num_layers=4,
    num_heads=4,
    num_kv_heads=1,
    global_step=4,
    hidden_width=512,
    num_experts=4,
    qk_norm=True,
    temperature_tuning=True,
    context_tokens=1 << 18,
    vocab_size=202048,
    tied=False,
    chat_format="llama4",
)
SHORT = 100  # characters of the prompts of chats, and of the short ones that come in later
EVERY_S = 10.0  # between short prompts
LEAST_SHARE, MOST_GAPS = 0.7, 5.0  # the promise

BY_CLOCK = """\
A short prompt of 100 tokens comes in every 10 s.
llama.cpp has its defaults (continuous batching, batch 2,048, ubatch 512), {slots} slots, a context for each.
Gaps are those that clients see, over all chats; the gap alone is the longest over the median, before the long prompt.

| | tok/s of a chat alone, before, after | meanwhile | least share kept | median gap, ms | p99 | longest | over the median alone \
| longest alone | long prompt's first token, s | its tok/s | short prompts' first token, ms | 0.7 kept and gaps <= 5 x |
|---|---|---|---|---|---|---|---|---|---|---|---|---|"""
BY_PROCESSOR = """\
The engine alone, its steps timed and paced by the processor's time. Each step gives each chat a token, so a step is a gap.

| | step alone, ms, before | meanwhile | all steps meanwhile | share kept | median, ms | longest | longest alone | prompt, s |
|---|---|---|---|---|---|---|---|---|"""


@dataclasses.dataclass(frozen=True)
class Side:
    """A server, how it is started and how it is asked."""

    name: str
    command: list[str]
    path: str
    is_herd: bool

    def body(self, text: str, max_tokens: int) -> dict[str, Any]:
        if self.is_herd:
            messages = [{"role": "user", "content": text}]
            asked = {"model": "mix", "messages": messages, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        else:
            asked = {"prompt": list(text.encode()), "n_predict": max_tokens, "top_k": 1, "samplers": ["top_k"], "ignore_eos": True}
            asked["cache_prompt"] = False
        return {**asked, "stream": True}


async def tokens(port: int, side: Side, text: str, max_tokens: int) -> AsyncIterator[float]:
    """When each token of a reply came in."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    try:
        body = json.dumps(side.body(text, max_tokens)).encode()
        writer.write(f"POST {side.path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n".encode())
        writer.write(f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        first = await reader.readline()
        assert b" 200 " in first, (first, await reader.read(2000))
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                text = event["choices"][0]["delta"].get("content", "") if side.is_herd else event["content"]
                if text:
                    yield time.perf_counter()
    finally:
        writer.close()


def text(numbers: random.Random, length: int) -> str:
    """A token for each character: no merge applies."""
    return "".join(chr(numbers.randrange(ord("a"), ord("q"))) for _ in range(length))


def tokenizer_files() -> dict[str, bytes]:
    """The byte tokenizer with one merge, since llama.cpp takes a tokenizer without any for none at all."""
    file = json.loads(byte_tokenizer().files()["tokenizer.json"])
    file["model"]["vocab"]["qz"] = len(file["model"]["vocab"])
    file["model"]["merges"] = [["q", "z"]]
    return {"tokenizer.json": json.dumps(file, ensure_ascii=False).encode()}


@dataclasses.dataclass
class Seen:
    """What the clients of one side saw. Seconds."""

    chats: list[list[float]]  # times of tokens
    before: tuple[float, float] = (0, 0)  # from and to
    during: tuple[float, float] = (0, 0)
    after: tuple[float, float] = (0, 0)
    short: list[float] = dataclasses.field(default_factory=list)  # to the first token of the short prompts


async def watch(port: int, side: Side, arguments: argparse.Namespace) -> Seen:
    numbers = random.Random(0)
    seen = Seen([[] for _ in range(arguments.chats)])

    async def chat(times: list[float], prompt: str) -> None:
        async for at in tokens(port, side, prompt, arguments.most):
            times.append(at)

    async def alone() -> tuple[float, float]:
        start = time.perf_counter()
        await asyncio.sleep(arguments.seconds)
        return start, time.perf_counter()

    async def first(prompt: str) -> float:
        start = time.perf_counter()
        (at,) = [at async for at in tokens(port, side, prompt, 1)]
        return at - start

    async def shorts() -> None:
        while True:
            await asyncio.sleep(EVERY_S)
            seen.short.append(await first(text(numbers, SHORT)))

    await first(text(numbers, SHORT))
    chats = [asyncio.create_task(chat(times, text(numbers, SHORT))) for times in seen.chats]
    while not all(len(times) > 50 for times in seen.chats):
        await asyncio.sleep(0.1)
    seen.before = await alone()
    log.info("%s: the long prompt comes in", side.name)
    shorter = asyncio.create_task(shorts())
    start = time.perf_counter()
    seconds = await first(text(numbers, arguments.tokens))
    seen.during = start, start + seconds
    shorter.cancel()
    log.info("%s: it has its first token after %.1f s", side.name, seconds)
    await asyncio.sleep(1)
    seen.after = await alone()
    assert not any(task.done() for task in chats), "a chat came to its end: raise --most"
    for task in chats:
        task.cancel()
    await asyncio.gather(*chats, shorter, return_exceptions=True)
    return seen


def rates(seen: Seen, span: tuple[float, float]) -> list[float]:
    """Tokens per second of each chat."""
    return [sum(span[0] < at <= span[1] for at in times) / (span[1] - span[0]) for times in seen.chats]


def gaps(seen: Seen, span: tuple[float, float]) -> list[float]:
    """Seconds between two tokens of a chat of which one or both came in the span, ascending."""
    pairs = [(a, b) for times in seen.chats for a, b in itertools.pairwise(times)]
    return sorted(b - a for a, b in pairs if b > span[0] and a < span[1])


def in_process(folder: Path, arguments: argparse.Namespace) -> str:
    """The same with an engine and no server, by the time that the processor spent on each step.

    What a step takes alone is that of the steps without a prompt: contexts grow meanwhile, and shrink where a new chunk begins.
    """
    choices = EngineConfig(threads=1, draft_tokens=0, kv="bf16", prefix_cache=False, pace=arguments.pace)
    engine, clock, numbers = open_engine(folder / "mix", config=choices, device="cpu"), time.process_time, random.Random(0)
    engine.watch.clock = clock

    def add(length: int, max_tokens: int) -> Sequence:
        prompt = Prompt(tokens=list(text(numbers, length).encode()), loss_mask=[False] * length)
        sequence = engine.sequence(prompt, Sampling(temperature=0, max_tokens=max_tokens, ignore_eos=True), _unheard)
        engine.scheduler.add(sequence)
        return sequence

    def step() -> float:
        start = clock()
        engine.step()
        return clock() - start

    for _ in range(arguments.chats):
        add(SHORT, arguments.most)
    for _ in range(50):
        step()
    before = [step() for _ in range(100)]
    long, during, between = add(arguments.tokens, 2), [], []
    while long.num_waiting > 1:
        done = long.num_computed
        during.append(step())
        if long.num_computed == done:
            between.append(during[-1])
    middle, mean = statistics.median(during), statistics.mean(during)
    cells = [
        "herd, processor time",
        *(f"{statistics.mean(each) * 1e3:.1f}" for each in (before, between, during)),
        f"**{statistics.mean(between) / mean:.2f}**",
        f"{middle * 1e3:.1f}",
        f"{max(during) * 1e3:.1f} = {max(during) / middle:.1f} x",
        f"{max(before) / statistics.median(before):.1f} x",
        f"{sum(during):.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def _unheard(event: object) -> None:
    del event


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def served(side: Side, port: int, folder: Path) -> Any:
    """A server that runs and is well."""
    command = [*side.command, "--host", "127.0.0.1", "--port", str(port)]
    with (folder / f"{side.name}.log").open("wb") as out:
        environment = {**os.environ, "LD_LIBRARY_PATH": str(Path(side.command[0]).parent)}
        process = subprocess.Popen(command, stdout=out, stderr=out, env=None if side.is_herd else environment)
    try:
        for _ in range(1200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as asked:
                asked.sendall(b"GET /health HTTP/1.0\r\n\r\n")
                if b" 200 " in asked.recv(100):
                    break
            if process.poll() is not None:
                sys.exit(f"error: {side.name} ended\n" + (folder / f"{side.name}.log").read_text()[-2000:])
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait(60)


def row(side: Side, seen: Seen, num_tokens: int) -> str:
    before, during, after = (rates(seen, span) for span in (seen.before, seen.during, seen.after))
    kept = [d / ((b + a) / 2) for b, d, a in zip(before, during, after, strict=True)]
    found = gaps(seen, seen.during)
    middle, p99 = statistics.median(found), found[int(len(found) * 0.99)]
    seconds = seen.during[1] - seen.during[0]
    quiet = gaps(seen, seen.before)
    holds = min(kept) >= LEAST_SHARE and found[-1] <= MOST_GAPS * middle
    usual = statistics.median(quiet)
    cells = [
        side.name,
        f"{statistics.mean(before):.1f}, {statistics.mean(after):.1f}",
        f"{statistics.mean(during):.2f}",
        f"**{min(kept):.2f}**",
        f"{middle * 1e3:.1f}",
        f"{p99 * 1e3:.1f}",
        f"{found[-1] * 1e3:.0f} = {found[-1] / middle:.1f} x",
        f"{found[-1] / usual:.1f} x",
        f"{quiet[-1] / usual:.1f} x",
        f"{seconds:.1f}",
        f"{num_tokens / seconds:.0f}",
        f"{statistics.median(seen.short) * 1e3:.0f}" if seen.short else "",
        "yes" if holds else "no",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", help="llama.cpp's llama-server; without it herd is alone")
    parser.add_argument("--tokens", type=int, default=100_000, help="of the long prompt")
    parser.add_argument("--chats", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10.0, help="that the chats are alone, before and after")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pace", type=float, default=0.7, help="herd's promise")
    parser.add_argument("--most", type=int, default=50_000, help="tokens of a chat")
    parser.add_argument("--cpu-time", action="store_true", help="herd's engine alone, in this process, by the processor's time")
    parser.add_argument("--save", action="store_true", help="write the table under bench/results/")
    arguments = parser.parse_args()
    show_logs()
    torch.set_num_threads(1)
    num_slots, room = arguments.chats + 2, max(arguments.tokens, arguments.most) + 1024
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_random(MODEL, folder / "mix", heads=range(32, 120), files=tokenizer_files())
        if arguments.cpu_time:
            tell(arguments, "mix_cpu", BY_PROCESSOR, in_process(folder, arguments))
            return
        herd = [sys.executable, "-m", "herd.cli.main", "serve", str(folder / "mix"), "--max-sequences", str(num_slots)]
        herd += ["--kv", "bf16", "--draft-tokens", "0", "--threads", str(arguments.threads), "--pace", str(arguments.pace)]
        sides = [Side("herd", herd, "/v1/chat/completions", is_herd=True)]
        if arguments.server:
            write(open_model(folder / "mix"), folder / "mix.gguf", "gguf")
            llama = [arguments.server, "-m", str(folder / "mix.gguf"), "-t", str(arguments.threads), "-np", str(num_slots)]
            llama += ["-c", str(num_slots * room), "--no-kv-unified", "--cache-ram", "0", "--no-webui"]
            sides.append(Side("llama.cpp", llama, "/completion", is_herd=False))
        for side in sides:
            port = free_port()
            with served(side, port, folder):
                rows.append(row(side, asyncio.run(watch(port, side, arguments)), arguments.tokens))
                log.info("%s", rows[-1])
    tell(arguments, "mix", BY_CLOCK.format(slots=num_slots), *rows)


def tell(arguments: argparse.Namespace, kind: str, about: str, *rows: str) -> None:
    """Print the table, and save it where that is wanted."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE).stdout.strip()
    choices = " --cpu-time" if arguments.cpu_time else " --server llama-server" if arguments.server else ""
    sides = (
        "one thread" if arguments.cpu_time else f"{arguments.threads} threads a side; server and clients on the same {os.cpu_count()} cores"
    )
    report = "\n".join(
        [
            f"# {arguments.chats} chats while a prompt of {arguments.tokens:,} tokens comes in",
            "",
            f"Command: `python bench/mix.py --tokens {arguments.tokens} --pace {arguments.pace}{choices}`, seed 0, commit {commit or '?'}.",
            f"{cpu()}, {sides} of a shared machine.",
            "Random int4 model: 4 layers of Cria's width with 4 experts, one of them global, chunk 8,192, 202,048 logits; keys and",
            "values in 16 bits, no guesses, no prefix cache of use.",
            *about.splitlines(),
            *rows,
            "",
        ]
    )
    print(report)
    if arguments.save:
        (HERE / "results" / f"{kind}_{cpu().split()[0].lower()}_{datetime.date.today():%Y%m%d}.md").write_text(report)


if __name__ == "__main__":
    main()
