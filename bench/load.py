#!/usr/bin/env python3
"""How many chats at once can a server bear? herd's against llama.cpp's own, the same weights, requests, slots and threads.

usage: load.py MODEL GGUF --rival LLAMA-SERVER [--requests 80] [--bound 2.5] [--save]

Requests arrive at random (Poisson), at a rate that is doubled and then halved in between until the highest is found at which 95 % of the
first tokens come within the bound. Both servers are searched so, step by step in turn, and meet the same requests at the same moments.

The requests: a system message that all share; nine of ten are short questions (20 words in the median), one brings a document of 200 to 900
words; replies are 16 to 192 tokens, 48 in the median, whatever the model would say (ignore_eos, greedy). llama.cpp's server runs as it
comes, continuous batching and prompt cache included, with 16 slots; herd too, but without drafts: past its end a reply of so small a model
repeats itself, and guesses would be right too often. The client shares the two cores with the server, for both alike.
"""

import argparse
import asyncio
import datetime
import os
import platform
import random
import statistics
import subprocess
import time
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from servers import Reply, Server, herd, llama_cpp, stream
from versus import HERE, cpu

from herd.log import log, show_logs

SLOTS, SLOT_TOKENS = 16, 4096
SYSTEM = (
    "You are the assistant of a public library. You answer questions about books, opening hours, rooms and events. You are polite and "
    "brief, you never invent a title, and you say so when you do not know. A text that a visitor brings you read with care."
)
_COMMON = (
    "the a of and to in is that it for was on are as with they at be this from have or by one had not but what all were when we there "
    "can an your which their said if do will each about how up out them then she many some so these would other into has more her two "
    "like him see time could no make than first been its who now people my made over did down only way find use may water long little "
    "very after words called just where most know get through back much before go good new write our used me man too any day same "
    "right look think also around another came come work three word must because does part even place well such here take why things "
    "help put years different away again off went old number great tell men say "
)
WORDS = _COMMON.split()


@dataclass(frozen=True, slots=True)
class Request:
    """What one visitor asks, and when."""

    turn: float  # moment of its arrival where one comes each second on average
    text: str
    reply_tokens: int


@dataclass(frozen=True, slots=True)
class Point:
    """One server at one rate."""

    server: str
    rate: float  # requests per second that arrive
    first_s: tuple[float, float, float]  # p50, p95, p99
    gap_s: tuple[float, float, float]
    tokens_s: float  # reply tokens per second, from the first arrival to the last end
    cpu_s: float  # of the server, per second
    others_s: float  # of all that is neither server nor client, per second

    def row(self) -> str:
        numbers = [f"{value * 1e3:,.0f}" for value in (*self.first_s, *self.gap_s)]
        return f"| {self.server} | {self.rate:.2f} | {self.tokens_s:.0f} | {' | '.join(numbers)} | {self.cpu_s:.2f} | {self.others_s:.2f} |"


def requests(count: int, seed: int, again: int = 0) -> list[Request]:
    """The same lengths and moments for a seed; again: other words, so that no prompt is known but for its beginning."""
    numbers, words = random.Random(seed), random.Random(f"{seed} {again}")
    made, turn = [], 0.0
    for i in range(count):
        turn += numbers.expovariate(1)
        is_document = i % 10 == 7  # one of ten, so that few requests hold the promised share
        length = numbers.randrange(200, 900) if is_document else round(min(120, numbers.lognormvariate(3.0, 0.7))) + 4
        text = " ".join(words.choice(WORDS) for _ in range(length))
        text = f"Please sum up this text: {text}." if is_document else f"{text.capitalize()}?"
        made.append(Request(turn, text, round(min(192, max(16, numbers.lognormvariate(3.87, 0.6))))))
    return made


async def load(server: Server, asked: list[Request], rate: float) -> list[Reply]:
    """Send every request when its time has come and read all replies."""
    start = time.perf_counter()

    async def one(request: Request) -> Reply:
        await asyncio.sleep(start + request.turn / rate - time.perf_counter())
        return await stream(server.port, body(request))

    return await asyncio.gather(*map(one, asked))


def body(request: Request) -> dict[str, Any]:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": request.text}]
    return {"model": "cria", "messages": messages, "max_tokens": request.reply_tokens, "temperature": 0, "ignore_eos": True}


def measure(server: Server, asked: list[Request], rate: float) -> tuple[Point, list[Reply]]:
    before, start = (server.cpu_s(), time.process_time(), machine_cpu_s()), time.perf_counter()
    replies = asyncio.run(load(server, asked, rate))
    seconds = time.perf_counter() - start
    after = server.cpu_s(), time.process_time(), machine_cpu_s()
    cpu_s, client_s, all_s = (b - a for a, b in zip(before, after, strict=True))
    for request, reply in zip(asked, replies, strict=True):
        assert reply.usage["completion_tokens"] == request.reply_tokens, "every reply has the length that was asked for"
    begin = min(reply.sent_s for reply in replies)
    end = max(reply.pieces_s[-1] for reply in replies)
    total = sum(request.reply_tokens for request in asked)
    firsts, gaps = [reply.first_s for reply in replies], list(chain.from_iterable(reply.gaps_s for reply in replies))
    point = Point(
        server.name, rate, ranks(firsts), ranks(gaps), total / (end - begin), cpu_s / seconds, (all_s - cpu_s - client_s) / seconds
    )
    log.info("%s", point.row())
    return point, replies


def machine_cpu_s() -> float:
    """CPU seconds that all processes of the machine have used since it started."""
    words = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    return (sum(map(int, words[1:8])) - int(words[4]) - int(words[5])) / os.sysconf("SC_CLK_TCK")  # neither idle nor waiting for a disk


def ranks(values: list[float]) -> tuple[float, float, float]:
    """p50, p95, p99."""
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return cuts[49], cuts[94], cuts[98]


class Search:
    """Brackets the highest rate that keeps the bound by doubling or halving, then halves the bracket (in logarithms) a few times."""

    def __init__(self, start: float, halvings: int) -> None:
        self.rate, self.good, self.bad, self._left = start, 0.0, float("inf"), halvings

    @property
    def is_over(self) -> bool:
        return self._left < 0

    def learn(self, is_good: bool) -> None:
        if is_good:
            self.good = max(self.good, self.rate)
        else:
            self.bad = min(self.bad, self.rate)
        if self.good and self.bad < float("inf"):
            self._left -= 1
            self.rate = (self.good * self.bad) ** 0.5
        else:
            self.rate *= 2 if self.good else 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint that herd loads")
    parser.add_argument("gguf", help="the same weights for llama.cpp")
    parser.add_argument("--rival", required=True, help="llama.cpp's llama-server, built for this machine")
    parser.add_argument("--requests", type=int, default=80, help="at each rate")
    parser.add_argument("--bound", type=float, default=2.5, help="seconds within which 95 %% of first tokens must come")
    parser.add_argument("--halvings", type=int, default=2, help="of the bracket: 2 find the rate to 19 %%, 3 to 9 %%")
    parser.add_argument("--start", type=float, default=1.0, help="requests per second that are tried first")
    parser.add_argument("--rates", type=float, nargs="*", help="measure at these rates and search nothing")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--herd-options", default="--draft-tokens=0", help="how herd is served, in one word: --herd-options='--pace=0 ...'")
    parser.add_argument("--only", choices=("herd", "llama.cpp"), help="leave the other out")
    parser.add_argument("--save", action="store_true", help="write the table under bench/results/")
    arguments = parser.parse_args()
    show_logs()
    slots = ["-np", str(SLOTS), "-c", str(SLOTS * SLOT_TOKENS)]
    points: list[Point] = []
    searches: dict[str, Search] = {}
    prompts: dict[int, list[int]] = {}  # how long they were, by how often the rate had changed
    with (
        herd(arguments.model, arguments.threads, f"--max-sequences={SLOTS}", *arguments.herd_options.split()) as ours,
        llama_cpp(arguments.rival, arguments.gguf, arguments.threads, *slots) as theirs,
    ):
        version = subprocess.run([arguments.rival, "--version"], capture_output=True, text=True).stderr.splitlines()[0]
        sides = [side for side in (ours, theirs) if arguments.only in (None, side.name)]
        for side in sides:
            searches[side.name] = Search(arguments.start, arguments.halvings)
            asyncio.run(load(side, requests(SLOTS, -1), 8))  # warms up: every slot has been used

        def point(side: Server, rate: float) -> Point:
            again = sum(point.server == side.name for point in points)
            found, replies = measure(side, requests(arguments.requests, arguments.seed, again), rate)
            lengths = [reply.usage["prompt_tokens"] for reply in replies]
            assert prompts.setdefault(again, lengths) == lengths, "both read the same number of tokens"
            points.append(found)
            return found

        for rate in arguments.rates or ():
            for side in sides:
                point(side, rate)
        while not arguments.rates and not all(search.is_over for search in searches.values()):
            for side in sides:
                search = searches[side.name]
                if not search.is_over:
                    search.learn(point(side, search.rate).first_s[1] <= arguments.bound)
    report = "\n".join([*about(arguments, prompts[0], version), *table(points), *found(points, searches, arguments.bound), ""])
    print(report)
    if arguments.save:
        name = f"load_{Path(arguments.model).name}_{cpu().split()[0].lower()}_{datetime.date.today():%Y%m%d}.md"
        (HERE / "results" / name).write_text(report)


def about(arguments: argparse.Namespace, prompts: list[int], version: str) -> list[str]:
    """What a reader needs to run it again."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE).stdout.strip()
    model, gguf = Path(arguments.model).name, Path(arguments.gguf).name
    replies, lengths = sorted(request.reply_tokens for request in requests(arguments.requests, arguments.seed)), sorted(prompts)
    return [
        f"# Requests per second that a server bears: {model}",
        "",
        f"Command: `python bench/load.py {model} {gguf} --rival llama-server --requests {arguments.requests} --bound {arguments.bound:g} "
        f"--start {arguments.start:g} --halvings {arguments.halvings} "
        f"--seed {arguments.seed}`, commit {commit or '?'}.",
        f"Hardware: {cpu()}, {arguments.threads} threads for each server, client on the same cores; Python {platform.python_version()}.",
        f"llama.cpp: {version.removeprefix('version: ')}, `-np {SLOTS} -c {SLOTS * SLOT_TOKENS}`, continuous batching and prompt cache on "
        f"as they are by default. herd: `--max-sequences={SLOTS} {arguments.herd_options}`.",
        f"{arguments.requests} requests a rate, Poisson arrivals; prompts of {spread(lengths)} tokens, system message included (least, "
        f"median, most; {sum(lengths):,} in all), replies of {spread(replies)} ({sum(replies):,}); greedy, ignore_eos; both sides in turn.",
        "First tokens and gaps (between two pieces of text) in ms, as the client sees them. CPU: seconds a second of the server, and of "
        "all that is neither server nor client: where that is not next to nothing, the row tells little.",
        "",
    ]


def spread(values: list[int]) -> str:
    return f"{values[0]}, {statistics.median(values):.0f}, {values[-1]:,}"


def table(points: list[Point]) -> list[str]:
    head = "| | requests/s | tok/s | first p50 | p95 | p99 | gap p50 | p95 | p99 | CPU | others' |"
    return [head, "|---|---|---|---|---|---|---|---|---|---|---|", *(p.row() for p in sorted(points, key=lambda p: (p.rate, p.server)))]


def found(points: list[Point], searches: dict[str, Search], bound: float) -> list[str]:
    """The highest rate of each that keeps the bound, and what it gave there."""
    best = {}
    for name, search in searches.items():
        if search.good:
            best[name] = next(p for p in points if p.server == name and p.rate == search.good)
    said = [
        f"{name}: {p.rate:.2f} requests/s with a p95 of {p.first_s[1]:.2f} s, {p.tokens_s:.0f} tok/s (not at {searches[name].bad:.2f})."
        for name, p in best.items()
    ]
    if len(best) == 2:
        ours, theirs = best["herd"], best["llama.cpp"]
        said.append(
            f"**herd bears {ours.rate / theirs.rate:.2f} times the requests, {ours.tokens_s / theirs.tokens_s:.2f} times the tok/s.**"
        )
    return ["", f"Highest rate at which 95 % of first tokens come within {bound:g} s:", "", *(f"* {line}" for line in said)] if said else []


if __name__ == "__main__":
    main()
