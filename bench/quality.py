#!/usr/bin/env python3
"""What do rounded activations and small keys and values cost in quality?  usage: quality.py [MODEL] [--tokens 20000] [--save]

The engine's own steps, over the documentation that comes with Python, against the float32 forward of the same weights: mean KL in nats per
token, perplexity, and the share of places where the likeliest token is the same.
"""

import argparse
import datetime
import math
import platform
import pydoc_data.topics
from pathlib import Path

import torch
from torch import Tensor

from herd.chat import Sampling
from herd.checkpoint.load import load_model
from herd.engine.config import EngineConfig
from herd.engine.engine import Engine
from herd.engine.inputs import build_inputs
from herd.engine.opening import open_engine
from herd.engine.scheduler import Piece, Plan
from herd.log import log, show_logs
from herd.ops.attend import Packed
from herd.text.prompt import Prompt
from herd.text.tokenizer import tokenizer_of

WINDOW = 1000  # tokens that see each other
CHOICES = {
    "16-bit activations, fp32 keys and values": {"activation_bits": 16, "kv": "fp32"},
    "16-bit activations, fp16 keys and values (what is served)": {"activation_bits": 16, "kv": "fp16"},
    "16-bit activations, bf16 keys and values": {"activation_bits": 16, "kv": "bf16"},
    "16-bit activations, int8 keys and values": {"activation_bits": 16, "kv": "int8"},
    "8-bit activations, fp16 keys and values": {"activation_bits": 8, "kv": "fp16"},
}


def served(engine: Engine, tokens: list[int]) -> Tensor:
    """Logits of every token, by one step of the engine: [T, V]."""
    sequence = engine.sequence(Prompt(tokens=tokens, loss_mask=[False] * len(tokens)), Sampling(temperature=0), lambda _: None)
    engine.scheduler.add(sequence)
    plan = engine.scheduler.next()
    assert plan.pieces == [Piece(sequence, 0, len(tokens), 1)]
    inputs = build_inputs(Plan(plan.pieces), engine.pages, engine.model)
    object.__setattr__(inputs, "rows", torch.arange(len(tokens)))
    logits = engine.runner(inputs)
    engine.scheduler.remove(sequence)
    return logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="cria")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--save", action="store_true", help="write the table under bench/results/")
    arguments = parser.parse_args()
    show_logs()
    exact, source = load_model(arguments.model, dtype=torch.float32)
    text = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    tokens = tokenizer_of(source.files).encode(text)[: arguments.tokens]
    engines = {
        name: open_engine(arguments.model, config=EngineConfig(step_tokens=WINDOW, prefix_cache=False, **choices))  # type: ignore[arg-type]
        for name, choices in CHOICES.items()
    }
    found = {name: torch.zeros(3, dtype=torch.float64) for name in ["float32", *engines]}  # KL, cross-entropy, same likeliest
    for start in range(0, len(tokens), WINDOW):
        window = tokens[start : start + WINDOW]
        ids, target = torch.tensor(window), torch.tensor(window[1:])
        with torch.inference_mode():
            best = exact(ids, torch.arange(len(ids)), Packed([len(ids)], exact.config.chunk_tokens)).log_softmax(-1)
            for name, sums in found.items():
                scores = best if name == "float32" else served(engines[name], window).log_softmax(-1)
                sums += torch.stack(
                    [
                        (best.exp() * (best - scores)).sum(-1).double().sum(),
                        -scores[:-1].gather(1, target[:, None]).double().sum(),
                        (scores.argmax(-1) == best.argmax(-1)).double().sum(),
                    ]
                )
        log.info("%d of %d tokens", start + len(window), len(tokens))
    predicted = len(tokens) - -(-len(tokens) // WINDOW)
    lines = ["| | mean KL, nats per token | perplexity | same likeliest token |", "|---|---|---|---|"]
    for name, (kl, entropy, same) in found.items():
        lines.append(f"| {name} | {kl / len(tokens):.6f} | {math.exp(entropy / predicted):.4f} | {same / len(tokens):.2%} |")
    name = Path(arguments.model).name
    report = [f"# What rounding costs: {name}", ""]
    report += [f"Command: `python bench/quality.py {name} --tokens {arguments.tokens}`.", f"Python {platform.python_version()}'s own "]
    report[-1] += f"documentation, {len(tokens):,} tokens in windows of {WINDOW:,}; torch {torch.__version__.split('+')[0]}."
    out = "\n".join([*report, "", *lines, ""])
    print(out)
    if arguments.save:
        (Path(__file__).parent / "results" / f"quality_{name}_{datetime.date.today():%Y%m%d}.md").write_text(out)


if __name__ == "__main__":
    main()
