#!/usr/bin/env python3
"""What does the server cost beside its engine, and does it bear many open streams whose readers come and go?

usage: streams.py MODEL [--streams 16] [--rounds 40] [--threads 2] [--save]                     what the server costs
       streams.py MODEL --minutes 10 [--streams 64] [--leaving 0.3] [--threads 2] [--save]     many streams, some readers leave

What it costs: chats, as many as --streams, run on the engine alone, where tokens become text and nobody reads it, and through the server
over HTTP, in turn and on one engine in one process: two of them differ by more than what is looked for, since memory is not equally fast
everywhere. What counts are pieces of text per second while all of them decode: from the moment when the last has its first to the one when
the first has its last. The client is another process on the same cores; what it takes is told, and counts as the server's.

Many streams: so many readers at once, each asks again when its reply has ended. Of so large a share of replies the reader leaves after some
pieces of text. In the end every other reply must have the tokens that were asked for, and a second later the engine must hold no sequence
and no page for anybody.
"""

import argparse
import asyncio
import datetime
import itertools
import json
import platform
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from servers import Reply, Server, herd, stream
from versus import HERE, Process, cpu

from herd.chat import ChatEvent, Done, Message, Sampling, Text
from herd.engine.config import EngineConfig
from herd.engine.local import Local, Model, load
from herd.errors import HerdError
from herd.log import log, show_logs
from herd.serve.app import Server as HttpServer
from herd.serve.app import bind, make_app
from herd.serve.config import ServeConfig

TOKENS = 96  # of a reply where what the server costs is measured
WORDS = ("sea", "sky", "bread", "winter", "music", "stone", "garden", "letter", "train", "island", "colour", "sleep")


def question(numbers: random.Random) -> str:
    return f"Write about {' '.join(numbers.choice(WORDS) for _ in range(8))}."


def together(replies: list[list[float]]) -> float:
    """Pieces per second while all decode. replies: of each the moments at which its pieces came."""
    start, stop = max(moments[0] for moments in replies), min(moments[-1] for moments in replies)
    return sum(start < moment <= stop for moments in replies for moment in moments) / (stop - start)


def engine_and_server(model: str, threads: int, streams: int) -> None:
    """The process that is measured: a server, and chats on its engine that bypass it. A line `{"texts": [...]}` asks for these, and every
    line is answered by one: pieces per second, and the CPU seconds that the server's thread has taken so far.
    """
    held = load(model, config=EngineConfig(threads=threads, draft_tokens=0, max_sequences=streams))
    config = ServeConfig(port=0)
    listener, ready = bind(config), threading.Event()
    server = HttpServer(make_app(Local([held]), config), config, lambda _: ready.set())
    serving = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    serving.start()
    ready.wait()
    assert serving.ident is not None
    clock = time.pthread_getcpuclockid(serving.ident)
    print(json.dumps({"port": listener.getsockname()[1]}), flush=True)
    for line in sys.stdin:
        texts = json.loads(line).get("texts", [])
        tok_s = alone(held, texts) if texts else 0.0
        print(json.dumps({"tok_s": tok_s, "loop_s": time.clock_gettime(clock)}), flush=True)


def alone(held: Model, texts: list[str]) -> float:
    """Pieces per second of replies that nobody reads."""
    engine, thread = held.thread.engine, held.thread
    moments: list[list[float]] = [[] for _ in texts]
    is_over = [threading.Event() for _ in texts]

    def emit(event: ChatEvent | HerdError, own: list[float], over: threading.Event) -> None:
        if isinstance(event, Text):
            own.append(time.perf_counter())
        elif isinstance(event, Done | HerdError):
            over.set()

    sampling = Sampling(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    for text, own, over in zip(texts, moments, is_over, strict=True):
        prompt = held.prompt([Message(role="user", content=(text,))])
        thread.submit(engine.sequence(prompt, sampling, partial(emit, own=own, over=over)))
    for over in is_over:
        over.wait()
    return together(moments)


def body(model: str, text: str, tokens: int) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": tokens, "temperature": 0, "ignore_eos": True}


def cost(arguments: argparse.Namespace) -> list[str]:
    """The engine alone and behind the server, in turn; who is first changes from round to round."""
    name, rows = Path(arguments.model).name, []
    sizes = [f"--streams={arguments.streams}", f"--threads={arguments.threads}"]
    side = Process([sys.executable, __file__, arguments.model, "--side", *sizes])

    async def all_streams(texts: list[str]) -> list[Reply]:
        return await asyncio.gather(*(stream(side.facts["port"], body(name, text, TOKENS)) for text in texts))

    for seed in range(-1, arguments.rounds):  # the first warms up
        numbers = random.Random(seed)
        engine_s = server_s = client_s = loop_us = 0.0
        for is_served in (bool(seed % 2), not seed % 2):
            texts = [question(numbers) for _ in range(arguments.streams)]
            if not is_served:
                engine_s = side.ask(texts=texts)["tok_s"]
                continue
            loop_s, cpu_s, start = side.ask()["loop_s"], time.process_time(), time.perf_counter()
            replies = asyncio.run(all_streams(texts))
            client_s = (time.process_time() - cpu_s) / (time.perf_counter() - start)
            loop_us = (side.ask()["loop_s"] - loop_s) / sum(len(reply.pieces_s) for reply in replies) * 1e6
            server_s = together([reply.pieces_s for reply in replies])
        if seed >= 0:
            rows.append((engine_s, server_s, client_s, loop_us))
            log.info("engine %.0f tok/s, server %.0f, CPU of the client %.3f, %.0f us a piece", *rows[-1])
    side.close()
    lost = sorted(1 - served / engine for engine, served, *_ in rows)
    low, middle, high = statistics.quantiles(lost, n=4)
    medians = [statistics.median(column) for column in zip(*rows, strict=True)]
    return [
        f"{arguments.rounds} rounds after one to warm up, {arguments.streams} greedy replies of {TOKENS} tokens; medians. CPU: seconds a "
        "second.",
        "",
        "| engine alone, tok/s | through the server | lost (quartiles) | client's CPU | server's thread, us a piece | of the cores' time |",
        "|---|---|---|---|---|---|",
        f"| {medians[0]:.0f} | {medians[1]:.0f} | **{middle:.1%}** ({low:.1%}, {high:.1%}) | "
        f"{medians[2]:.3f} | {medians[3]:.0f} | {medians[3] * medians[0] / 1e6 / arguments.threads:.1%} |",
    ]


def held(server: Server) -> dict[str, float]:
    """What the engine holds for sequences, from /metrics."""
    text = server.get("/metrics")[1].decode()
    found = re.findall(r"^(herd_sequences_(?:running|waiting)|herd_pages)\{([^}]*)\} (\S+)$", text, re.MULTILINE)
    return {f"{name} {labels}": float(value) for name, labels, value in found if name != "herd_pages" or 'state="used"' in labels}


async def come_and_go(server: Server, arguments: argparse.Namespace, name: str, tally: Counter[str], gaps: list[float]) -> None:
    """Readers who ask, read or leave, and ask again until the time is over."""
    stop = time.perf_counter() + arguments.minutes * 60

    async def reader(seed: int) -> None:
        numbers = random.Random(seed)
        while time.perf_counter() < stop:
            tokens, leaves = numbers.randrange(16, 193), numbers.random() < arguments.leaving
            reply = await stream(server.port, body(name, question(numbers), tokens), numbers.randrange(tokens // 2) if leaves else None)
            gaps.extend(reply.gaps_s)
            tally["left" if leaves else "whole" if reply.usage.get("completion_tokens") == tokens else "cut"] += 1

    async def tell() -> None:
        for minute in itertools.count(1):
            await asyncio.sleep(60)
            log.info("minute %d: %s, %.1f MB", minute, dict(tally), server.resident_bytes() / 1e6)

    telling = asyncio.create_task(tell())
    await asyncio.gather(*(reader(seed) for seed in range(arguments.streams)))
    telling.cancel()


def many(arguments: argparse.Namespace) -> list[str]:
    """Readers come and go for some minutes."""
    name, tally, gaps = Path(arguments.model).name, Counter[str](), list[float]()
    with herd(arguments.model, arguments.threads, f"--max-sequences={arguments.streams}") as server:
        asyncio.run(asyncio.wait_for(stream(server.port, body(name, question(random.Random(-1)), 64)), 60))
        before = server.resident_bytes()
        asyncio.run(come_and_go(server, arguments, name, tally, gaps))
        time.sleep(1)
        after, left = server.resident_bytes(), held(server)
        health = server.get("/health")[0]
    cuts = statistics.quantiles(gaps, n=1000, method="inclusive")
    assert left, "/metrics has changed its names"
    is_clean = not any(left.values()) and health == 200 and not tally["cut"]
    return [
        f"{arguments.streams} readers for {arguments.minutes:g} minutes, greedy replies of 16 to 192 tokens; {arguments.leaving:.0%} "
        "are left in mid-reply. Memory grows until the pages of keys and values (--kv-gib, 2 GiB) are in use, most of them as a cache.",
        "",
        "| whole replies | left by their reader | cut short | gaps p50, ms | p99 | p99.9 | longest | held at the end | memory before, MB "
        "| after |",
        "|---|---|---|---|---|---|---|---|---|---|",
        f"| {tally['whole']:,} | {tally['left']:,} | {tally['cut']} | {cuts[499] * 1e3:.0f} | {cuts[989] * 1e3:.0f} | "
        f"{cuts[998] * 1e3:.0f} | {max(gaps) * 1e3:.0f} | {'nothing' if not any(left.values()) else left} | "
        f"{before / 1e6:.0f} | {after / 1e6:.0f} |",
        "",
        "Nothing was lost and nothing is held." if is_clean else "**Something was lost, or is still held.**",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint that herd loads")
    parser.add_argument("--streams", type=int, help="open at once (default: 16, and 64 with --minutes)")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--minutes", type=float, help="let readers come and go for so long")
    parser.add_argument("--leaving", type=float, default=0.3, help="share of the replies whose reader leaves")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", action="store_true", help="write the table under bench/results/")
    parser.add_argument("--side", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.streams = arguments.streams or (64 if arguments.minutes else 16)
    if arguments.side:
        engine_and_server(arguments.model, arguments.threads, arguments.streams)
        return
    show_logs()
    rows = many(arguments) if arguments.minutes else cost(arguments)
    name = Path(arguments.model).name
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE).stdout.strip()
    choices = f" --minutes {arguments.minutes:g} --leaving {arguments.leaving:g}" if arguments.minutes else f" --rounds {arguments.rounds}"
    title = "Many streams whose readers come and go" if arguments.minutes else "What the server costs beside its engine"
    report = [
        f"# {title}: {name}",
        "",
        f"Command: `python bench/streams.py {name} --streams {arguments.streams}{choices} --threads {arguments.threads}`, "
        f"commit {commit or '?'}.",
        f"Hardware: {cpu()}, {arguments.threads} threads; the client runs on the same cores. Python {platform.python_version()}.",
        *rows,
        "",
    ]
    print("\n".join(report))
    if arguments.save:
        kind = "streams" if arguments.minutes else "overhead"
        (HERE / "results" / f"{kind}_{name}_{cpu().split()[0].lower()}_{datetime.date.today():%Y%m%d}.md").write_text("\n".join(report))


if __name__ == "__main__":
    main()
