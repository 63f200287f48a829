"""What does it cost to hold a reply to a grammar?

    python bench/grammar.py               masks over the vocabulary of Llama 4, and whole replies of the default model
    python bench/grammar.py --no-model    masks alone

Masks: each grammar reads a text of its own, token by token; the mask before each is timed, and what it takes to set logits by it. Replies:
the default model writes an object of five fields, greedily, free and held to its schema, with what the grammar forces as drafts and
without, and with masks made while the model computes or after it.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import llama_models
import torch

import herd
from herd.chat import Format, Message, Sampling, Tool, ToolChoice
from herd.engine.engine import Engine
from herd.engine.grammar import Grammar, Grammars
from herd.text.grammar import reply_grammar
from herd.text.tokenizer import TiktokenTokenizer

FIELDS = {"name": "string", "city": "string", "age": "integer", "is_member": "boolean", "score": "number"}
SCHEMA = {
    "type": "object",
    "properties": {name: {"type": kind} for name, kind in FIELDS.items()},
    "required": list(FIELDS),
    "additionalProperties": False,
}
OBJECT = {"name": "Ada Lovelace", "city": "London, not far from the river", "age": 36, "is_member": True, "score": -1.25e3}
TOOLS = tuple(Tool(name=f"tool_{i}", description="?", parameters=SCHEMA) for i in range(10))
CALL = f'[tool_3({", ".join(f"{key}={value!r}".replace(chr(39), chr(34)) for key, value in OBJECT.items())}), tool_7(name="x", city=""'
TEXT = Path(__file__).parent.parent.joinpath("README.md").read_text()[:2000].replace("[", "(")
CASES: list[tuple[str, Format | None, tuple[Tool, ...], ToolChoice, str]] = [
    ("object of 5 fields", Format(kind="json_schema", value=SCHEMA), (), ToolChoice(), json.dumps(OBJECT)),
    ("any object", Format(kind="json_object"), (), ToolChoice(), json.dumps(OBJECT)),
    ("10 tools, a call is required", None, TOOLS, ToolChoice(mode="required"), CALL),
    ("10 tools, text", None, TOOLS, ToolChoice(), TEXT),
    ("10 tools, text and a call", None, TOOLS, ToolChoice(), TEXT + CALL),
]


def micros(call: Any, *arguments: Any) -> float:
    start = time.perf_counter()
    call(*arguments)
    return (time.perf_counter() - start) * 1e6


def masks() -> None:
    tokenizer = TiktokenTokenizer((Path(llama_models.__file__).parent / "llama4" / "tokenizer.model").read_bytes())
    grammars = Grammars(tokenizer, tokenizer.vocab_size, [200_001, 200_007, 200_008])
    warm = json.dumps({"grammars": [{"lark_grammar": 'start: "x"'}]})
    print(f"Vocabulary of {tokenizer.vocab_size:,} tokens, made ready once in {micros(grammars.compile, warm, '') / 1e6:.2f} s\n")
    print("| grammar | tokens | compile ms | mask us, median | mean | 99 % | set logits us | read us |\n|---|---|---|---|---|---|---|---|")
    for name, form, tools, choice, text in CASES:
        written = reply_grammar(form, tools, choice, "pythonic")
        compiling = micros(grammars.compile, written, "")
        grammar: Grammar = grammars.compile(str(written), "")
        making, setting, reading = [], [], []
        for token in tokenizer.encode(text):
            logits = torch.zeros(tokenizer.vocab_size)
            making.append(micros(grammar.prepare))
            setting.append(micros(grammar.mask, logits))
            assert logits[token] == 0, f"{name}: {tokenizer.token_bytes(token)!r} may not come"
            reading.append(micros(grammar.read, token))
        making.sort()
        print(
            f"| {name} | {len(making)} | {compiling / 1e3:.1f} | {statistics.median(making):.0f} | {statistics.mean(making):.0f} "
            f"| {making[int(0.99 * len(making))]:.0f} | {statistics.median(setting):.0f} | {statistics.median(reading):.1f} |"
        )


def replies(repetitions: int) -> None:
    model = herd.load("cria", device="cpu")
    prompt = model.prompt([Message(role="user", content=("Describe a member of the club as JSON.",))])
    print("\n| the default model | tokens | ms a token, median | best |\n|---|---|---|---|")
    for name, form, drafts, beside in (
        ("free", None, 0, True),
        ("held to a schema, masks beside the model", Format(kind="json_schema", value=SCHEMA), 0, True),
        ("held to a schema, masks after the model", Format(kind="json_schema", value=SCHEMA), 0, False),
        ("held to a schema, forced tokens as drafts", Format(kind="json_schema", value=SCHEMA), 8, True),
    ):
        config = herd.engine.config.EngineConfig(draft_tokens=drafts, kv_gib=0.5, prefix_cache=False)
        engine = Engine(model.llama4, model.tokenizer, config)
        if not beside:
            engine.masks.start = lambda _: None  # type: ignore[method-assign]
        times, count = [], 0
        for _ in range(repetitions):
            sequence = engine.sequence(prompt, Sampling(temperature=0, max_tokens=60, format=form), lambda _: None)
            engine.scheduler.add(sequence)
            engine.step()
            start, before = time.perf_counter(), len(sequence.tokens)
            while not engine.scheduler.is_idle:
                engine.step()
            count = len(sequence.tokens) - before
            times.append((time.perf_counter() - start) / count * 1e3)
        print(f"| {name} | {count} | {statistics.median(times):.2f} | {min(times):.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--no-model", action="store_true")
    parser.add_argument("--repetitions", type=int, default=10)
    options = parser.parse_args()
    masks()
    if not options.no_model:
        replies(options.repetitions)


if __name__ == "__main__":
    main()
