#!/usr/bin/env python3
"""What do guesses at the next tokens gain, and what do they cost where nothing repeats?  usage: repeat.py [MODEL] [--rounds 3] [--save]

Two kinds of replies, each computed with guesses and without, in turn, by the same engine; that both are the same tokens is asserted.

"Repeat this file with one change": the prompt holds a file of Python, the reply is that file with its class renamed. Cria is too small to
do as it is told, so here the sampler, having drawn, says the right next token in place of what it drew: the engine's work at each step is
that of a model which repeats the file. What Cria itself makes of such requests is the second row.

Free chat: 20 questions, Cria's own greedy replies to their end, 200 tokens at most.

Speed is that of decoding, from the first token to the last. The ratio is that of the seconds for all replies of a round; given is the
median round, with the least and the most.
"""

import argparse
import datetime
import platform
import statistics
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from versus import HERE, cpu

from herd.chat import Message, Sampling
from herd.engine.config import EngineConfig
from herd.engine.engine import Engine
from herd.engine.lookup import Lookup
from herd.engine.opening import open_engine
from herd.engine.sampler import Sampler
from herd.log import log, show_logs
from herd.text.prompt import Prompt, render

FILE = '''import json
from pathlib import Path


class Inventory:
    """What a shop has in stock."""

    def __init__(self, path):
        self.path = Path(path)
        self.items = {}

    def load(self):
        with self.path.open() as file:
            self.items = json.load(file)

    def save(self):
        with self.path.open("w") as file:
            json.dump(self.items, file, indent=2)

    def add(self, name, count, price):
        if name in self.items:
            self.items[name]["count"] += count
        else:
            self.items[name] = {"count": count, "price": price}

    def remove(self, name, count):
        if name not in self.items:
            raise KeyError(f"no item is called {name}")
        if self.items[name]["count"] < count:
            raise ValueError(f"only {self.items[name]['count']} of {name} are left")
        self.items[name]["count"] -= count

    def total(self):
        return sum(item["count"] * item["price"] for item in self.items.values())
'''
EDITS = (
    "Repeat this file, but call the class Stock:\n\n```python\n{file}```",
    "Copy this code:\n\n```python\n{file}```\n\nThe copy:",
    "Write this file again, with a method that returns the number of items:\n\n```python\n{file}```",
)
QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "List three uses of a hammer.",
    "Explain photosynthesis to a child.",
    "Translate 'good morning' to Spanish.",
    "What is 17 plus 25?",
    "Write a Python function that reverses a string.",
    "Who wrote Romeo and Juliet?",
    "Give me a recipe for pancakes.",
    "Summarize the story of Cinderella in two sentences.",
    "What is the largest planet in the solar system?",
    "Name four programming languages.",
    "How do I boil an egg?",
    "What are the primary colors?",
    "Write a short email asking for a day off.",
    "Why is the sky blue?",
    "What does HTTP stand for?",
    "Tell me a joke about cats.",
    "What is the difference between a list and a tuple in Python?",
    "Describe a sunset in one sentence.",
)


@dataclass(frozen=True, slots=True)
class Ask:
    """One reply that is wanted."""

    tokens: list[int]  # of the prompt
    script: tuple[int, ...] = ()  # what the reply shall be; empty: what the model says


@dataclass(frozen=True, slots=True)
class Run:
    """One reply that came."""

    reply: list[int]
    seconds: float  # from the first token to the last
    num_drafted: int
    num_accepted: int


class Obedient(Sampler):
    """Draws as every sampler does, and says what it was told to."""

    def __init__(self, sampling: Sampling, script: tuple[int, ...]) -> None:
        super().__init__(sampling)
        self._script: Iterator[int] = iter(script)

    def __call__(self, logits: torch.Tensor) -> int:
        super().__call__(logits)
        return next(self._script)


def run(engine: Engine, ask: Ask, draft_tokens: int) -> Run:
    sampling = Sampling(temperature=0, top_p=1.0, max_tokens=len(ask.script) or 200, ignore_eos=bool(ask.script))
    sequence = engine.sequence(Prompt(tokens=ask.tokens, loss_mask=[False] * len(ask.tokens)), sampling, _unheard)
    sequence.lookup = Lookup(draft_tokens)
    if ask.script:
        sequence.sampler = Obedient(sampling, ask.script)
    engine.scheduler.add(sequence)
    while len(sequence.tokens) == len(ask.tokens):
        engine.step()
    start = time.perf_counter()
    while not engine.scheduler.is_idle:
        engine.step()
    seconds = time.perf_counter() - start
    return Run(sequence.tokens[len(ask.tokens) :], seconds, sequence.lookup.num_drafted, sequence.lookup.num_accepted)


def _unheard(event: object) -> None:
    del event


def compare(engine: Engine, label: str, asks: list[Ask], draft_tokens: int, rounds: int) -> str:
    """A row of the table. Which side comes first changes from one reply to the next, and from round to round."""
    found: list[tuple[float, float]] = []
    for number in range(-1, rounds):  # round -1 warms up
        seconds = [0.0, 0.0]
        total = drafted = accepted = 0
        for i, ask in enumerate(asks):
            sides = (0, 1) if (i + number) % 2 else (1, 0)
            runs = {side: run(engine, ask, draft_tokens * side) for side in sides}
            assert runs[0].reply == runs[1].reply, "guesses change no reply"
            assert not ask.script or runs[0].reply == list(ask.script)
            for side in sides:
                seconds[side] += runs[side].seconds
            total += len(runs[0].reply) - 1
            drafted, accepted = drafted + runs[1].num_drafted, accepted + runs[1].num_accepted
        log.info("%s, round %d: %.1f and %.1f tok/s", label, number + 1, total / seconds[1], total / seconds[0])
        if number >= 0:
            found.append((seconds[1], seconds[0]))
    ratios = sorted(without / with_ for with_, without in found)
    rates = [total / statistics.median(side) for side in zip(*found, strict=True)]
    return (
        f"| {label} | {total} | {rates[0]:.1f} | {rates[1]:.1f} | **{statistics.median(ratios):.2f}** ({ratios[0]:.2f}, {ratios[-1]:.2f}) "
        f"| {drafted} | {accepted} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="cria", help="a checkpoint that herd loads")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--draft-tokens", type=int, default=EngineConfig().draft_tokens)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", action="store_true", help="write the table under bench/results/")
    arguments = parser.parse_args()
    show_logs()
    torch.set_num_threads(1)
    engine = open_engine(arguments.model, config=EngineConfig(threads=arguments.threads, draft_tokens=arguments.draft_tokens), device="cpu")

    def asked(text: str) -> list[int]:
        return render([Message(role="user", content=(text,))], engine.tokenizer, chat_format=engine.model.chat_format).tokens

    script = tuple(engine.tokenizer.encode(f"```python\n{FILE.replace('Inventory', 'Stock')}```"))
    edits = [asked(text.format(file=FILE)) for text in EDITS]
    rows = [
        compare(engine, label, asks, arguments.draft_tokens, arguments.rounds)
        for label, asks in (
            ("a file repeated with one change", [Ask(edits[0], script)]),
            ("what the model makes of such requests", [Ask(tokens) for tokens in edits]),
            ("free chat, 20 questions", [Ask(asked(text)) for text in QUESTIONS]),
        )
    ]
    name = Path(arguments.model).name
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE).stdout.strip()
    report = "\n".join(
        [
            f"# Guesses at the next tokens: {name}",
            "",
            f"Command: `python bench/repeat.py {name} --rounds {arguments.rounds}`, commit {commit or '?'}.",
            f"Hardware: {cpu()}, {engine.threads} threads, Python {platform.python_version()}; one sequence at a time, greedy; up to "
            f"{arguments.draft_tokens} guesses a step.",
            f"The file has {len(script)} tokens. Same engine with and without, in turn; replies are asserted to be the same.",
            f"Median of {arguments.rounds} rounds after one to warm up (least, most).",
            "",
            "| | tokens | tok/s with guesses | without | ratio | guessed | right |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )
    print(report)
    if arguments.save:
        (HERE / "results" / f"repeat_{name}_{cpu().split()[0].lower()}_{datetime.date.today():%Y%m%d}.md").write_text(report)


if __name__ == "__main__":
    main()
