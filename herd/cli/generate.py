"""Continue a text: `herd generate "Once upon a time"`, `herd generate MODEL "..."`, or `... -` to read the text from stdin."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import AvoidSubcommands, Positional, arg

from herd.chat import Sampling
from herd.cli.terminal.clean import clean
from herd.engine.config import EngineConfig
from herd.engine.local import load
from herd.engine.trace import TraceFile
from herd.errors import UsageError
from herd.model.presets import PRESETS


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The text alone goes to stdout. On a terminal its control characters are shown as pictures; a file or a pipe gets them as they are."""

    words: Annotated[Positional[tuple[str, ...]], arg(metavar="[MODEL] PROMPT")] = ()  # PROMPT may be - for stdin
    sampling: AvoidSubcommands[Sampling] = field(default_factory=Sampling)
    trace: Path | None = None  # file for what every step did, to be opened in ui.perfetto.dev
    engine: EngineConfig = field(default_factory=EngineConfig)


def run(options: Options) -> int:
    if len(options.words) not in (1, 2):
        raise UsageError(f"generate takes [MODEL] PROMPT, and got {len(options.words)} words", "put the prompt in quotes")
    name, prompt = options.words if len(options.words) == 2 else ("cria", options.words[0])
    if len(options.words) == 1 and prompt in PRESETS:
        raise UsageError(f"{prompt!r} is the name of a model, and there is no prompt", f'herd generate {prompt} "Once upon a time"')
    if prompt == "-":
        prompt = sys.stdin.read()
    model = load(name, config=options.engine, trace=TraceFile(options.trace) if options.trace else None)
    shown = clean if sys.stdout.isatty() else str  # a file gets what the model wrote
    for piece in model.generate(prompt, sampling=options.sampling):
        print(shown(piece), end="", flush=True)
    print()
    return 0
