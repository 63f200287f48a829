"""An engine whose model says what it is told, token by token, if it may: for tests of all that lies around a model."""

from typing import Any

import torch
from torch import Tensor

from herd.chat import ChatEvent, Fold, Sampling, Tool, ToolChoice
from herd.engine.engine import Engine
from herd.engine.inputs import Inputs
from herd.errors import HerdError
from herd.text.prompt import Prompt
from herd.text.tokenizer import byte_tokenizer

EOT = byte_tokenizer().specials["<|eot|>"]


class Scripted:
    """The runner of an engine: after the prompt the likeliest token is the script's next, or its last where it has gone elsewhere."""

    def __init__(self, of: Engine, prompt_tokens: int, script: list[int]) -> None:
        self.engine, self.start, self.script = of, prompt_tokens, script

    def see(self, plan: Any) -> None:
        """No images."""

    def __call__(self, inputs: Inputs) -> Tensor:
        logits = torch.zeros(len(inputs.rows), self.engine.model.vocab_size)
        for row, position in enumerate(inputs.positions[inputs.rows].tolist()):
            place = min(position + 1 - self.start, len(self.script) - 1)
            logits[row, self.script[place]] = 50.0
        return logits


def say(
    of: Engine, script: str | list[int], tools: tuple[Tool, ...] = (), choice: ToolChoice | None = None, **sampling: Any
) -> tuple[list[ChatEvent], Fold]:
    """The events of a reply that wants to be `script`, and their fold."""
    tokens = [*script.encode(), EOT] if isinstance(script, str) else script
    prompt = Prompt(tokens=[256, *b"ask"], loss_mask=[False] * 4)
    of.runner = Scripted(of, 4, tokens)  # type: ignore[assignment]
    events: list[ChatEvent] = []

    def emit(event: ChatEvent | HerdError) -> None:
        if isinstance(event, HerdError):
            raise event
        events.append(event)

    sequence = of.sequence(prompt, Sampling(**{"temperature": 0, **sampling}), emit, tools=tools, tool_choice=choice)
    of.scheduler.add(sequence)
    while not of.scheduler.is_idle:
        for _, event in of.step():
            emit(event)
    return events, Fold(events)
