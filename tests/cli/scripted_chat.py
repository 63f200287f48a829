"""`herd chat` over the tiny model, whose replies are those of a script: for tests that sit at its terminal.

python -m tests.cli.scripted_chat '[["reply", seconds per token], ...]' [options of herd chat]
"""

import json
import sys
import time
from typing import Any

from torch import Tensor

from herd.cli import chat, main
from herd.engine.inputs import Inputs
from herd.engine.local import Model, load
from tests.engine.scripted import EOT, Scripted


class Slow(Scripted):
    """A script that takes its time."""

    whole = None
    token_s = 0.0

    def __call__(self, inputs: Inputs) -> Tensor:
        time.sleep(self.token_s)
        return super().__call__(inputs)


def scripted(replies: list[tuple[str, float]]) -> Any:
    """A `load` whose model says these one after the other."""

    def loaded(name: str, **choices: Any) -> Model:
        model = load(name, **choices)
        engine = model.thread.engine
        runner, make = Slow(engine, 0, []), engine.sequence

        def sequence(prompt: Any, *args: Any, **named: Any) -> Any:
            made = make(prompt, *args, **named)
            text, runner.token_s = replies.pop(0)
            runner.start, runner.script = len(prompt.tokens), [*text.encode(), EOT]
            return made

        runner.see = engine.runner.see
        engine.runner, engine.sequence = runner, sequence  # type: ignore[assignment, method-assign]
        return model

    return loaded


if __name__ == "__main__":
    chat.load = scripted(json.loads(sys.argv[1]))  # type: ignore[attr-defined]
    sys.exit(main.main(["chat", "tiny", *sys.argv[2:]]))
