"""Runs the model on the inputs of a step."""

import torch
from torch import Tensor

from herd.engine.inputs import Inputs
from herd.engine.scheduler import Plan
from herd.model.llama4 import Llama4


class Runner:
    """A model on its device."""

    def __init__(self, model: Llama4) -> None:
        self.model = model.eval().requires_grad_(False)

    @torch.inference_mode()
    def see(self, plan: Plan) -> None:
        """Encode the images of sequences whose patches come up in this step, once each."""
        for piece in plan.pieces:
            sequence = piece.sequence
            found = sequence.patches_between(piece.start, piece.stop)
            if sequence.features is None and found.start < found.stop:
                device = self.model.embed.weight.device
                seen = [self.model.see(torch.from_numpy(tiles.pixels).to(device)) for tiles in sequence.prompt.images]
                sequence.features = torch.cat(seen)

    @torch.inference_mode()
    def __call__(self, inputs: Inputs) -> Tensor:
        """Logits of the wanted rows: [n, V] float32."""
        logits: Tensor = self.model(
            inputs.tokens, inputs.positions, inputs.attend, inputs.features, patches=inputs.patches, rows=inputs.rows
        )
        return logits
