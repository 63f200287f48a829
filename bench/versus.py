"""What the benches against llama.cpp share: both hold the same weights in a process of their own and are timed in turn, round by round.

Every round asks each once and measures the machine's limits between; so a machine that is now fast, now slow, is so for both. What counts
is the ratio within a round, of which the median is given.
"""

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from herd.log import log, show_logs

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Case:
    """One row of a table."""

    label: str
    ask: dict[str, Any]  # what both are asked for
    num_tokens: int  # in all


class Process:
    """One side."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self.facts = self._answer()

    def ask(self, **ask: Any) -> dict[str, Any]:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(ask) + "\n")
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(60)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"error: {' '.join(self._process.args)} ended\nhint: look at what it printed above")  # type: ignore[arg-type]
        answer: dict[str, Any] = json.loads(line)
        return answer


def parse(doc: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint that herd loads")
    parser.add_argument("gguf", help="the same weights for llama.cpp: `herd convert MODEL x.gguf --to gguf`")
    parser.add_argument("--rival", default=sys.executable, help="a python with llama-cpp-python (default: this one)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=2048, help="ids are drawn below it")
    parser.add_argument("--save", action="store_true", help="write the table under bench/results/")
    return parser.parse_args()


def compare(question: str, arguments: argparse.Namespace, cases: list[Case], bound: str) -> None:
    """Time both on every case and print the table. bound: "read", bytes of the weights at the speed of memory, or "peak", operations."""
    show_logs()
    ours = Process([sys.executable, str(HERE / "ours.py"), arguments.model, str(arguments.threads)])
    theirs = Process([arguments.rival, str(HERE / "llamacpp.py"), arguments.gguf, str(arguments.threads)])
    lines = [
        "| | herd tok/s | llama.cpp tok/s | ratio (least, most) | limit tok/s | herd's share | llama.cpp's |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        rounds = []
        for seed in range(-1, arguments.rounds):  # round -1 warms up
            asked = {**case.ask, "seed": seed, "vocabulary": arguments.vocabulary}
            pair = [side.ask(**asked)["seconds"] for side in ((ours, theirs) if seed % 2 else (theirs, ours))]
            us, them = pair if seed % 2 else pair[::-1]
            limits = ours.ask(do="limits", seed=0)
            if seed >= 0:
                rounds.append((us, them, limits))
                log.info("%s, round %d: %.1f and %.1f tok/s", case.label, seed + 1, case.num_tokens / us, case.num_tokens / them)
        us, them = (statistics.median(r[i] for r in rounds) for i in (0, 1))
        ratios = sorted(r[1] / r[0] for r in rounds)
        if bound == "read":
            best = max(r[2]["read_gb_s"] for r in rounds)
            limit = best * 1e9 / ours.facts["active_bytes"] * case.ask.get("sequences", 1)
            said = f"{limit:.0f} ({best:.1f} GB/s)"
        else:
            best = max(r[2]["peak_gop_s"] for r in rounds)
            limit = best * 1e9 / (2 * case_weights(ours)) / (ours.facts["activation_bits"] // 8)
            said = f"{limit:.0f} ({best:.0f} Gop/s, {ours.facts['activation_bits']}-bit activations)"
        rates = [case.num_tokens / seconds for seconds in (us, them)]
        lines.append(
            f"| {case.label} | {rates[0]:.1f} | {rates[1]:.1f} | **{statistics.median(ratios):.2f}** ({ratios[0]:.2f}, {ratios[-1]:.2f}) "
            f"| {said} | {rates[0] / limit:.0%} | {rates[1] / limit:.0%} |"
        )
    name = Path(arguments.model).name
    report = "\n".join([f"# {question}: {name}", "", *about(arguments, ours, theirs), "", *lines, ""])
    print(report)
    for side in (ours, theirs):
        side.close()
    if arguments.save:
        stem = f"{Path(sys.argv[0]).stem}_{name}_{cpu().split()[0].lower()}_{datetime.date.today():%Y%m%d}.md"
        (HERE / "results" / stem).write_text(report)


def case_weights(side: Process) -> int:
    """Weights that a token passes through, nearly: their bytes at 4.5 bits each."""
    return int(side.facts["active_bytes"] * 8 / 4.5)


def about(arguments: argparse.Namespace, ours: Process, theirs: Process) -> list[str]:
    """What a reader needs to run it again."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE).stdout.strip()
    command = f"python bench/{Path(sys.argv[0]).name} {Path(arguments.model).name} {Path(arguments.gguf).name} --rounds {arguments.rounds}"
    return [
        f"Command: `{command}`, commit {commit or '?'}.",
        f"Hardware: {cpu()}, {arguments.threads} threads; herd's kernels on {ours.facts['path']}, activations of "
        f"{ours.facts['activation_bits']} bits.",
        "A shared machine: its speed changes from round to round, for both alike.",
        f"llama-cpp-python {theirs.facts['version']}, built for this machine ({features(theirs.facts['system'])}).",
        f"Median of {arguments.rounds} rounds after one to warm up, both sides in turn, random ids (seed = round).",
        "herd's side is its engine's whole step, sampling and text included; llama.cpp's is `llama_decode`.",
        "Limit: the best reading of memory (or byte products in registers) seen between the rounds, over what a token reads (or computes); "
        "of several sequences, as if all of them met the same weights.",
    ]


def features(system: str) -> str:
    return ", ".join(part.split(" = ")[0].strip() for part in system.replace("CPU :", "|").split("|") if part.strip().endswith("= 1"))


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].removeprefix("AMD ") if names else platform.processor()
