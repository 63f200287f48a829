"""Runs the model on the inputs of a step."""

import torch
from torch import Tensor

from herd.engine.graphs import Graphs
from herd.engine.inputs import Inputs
from herd.engine.pages import Pages
from herd.engine.scheduler import Plan
from herd.engine.whole import WholeStep
from herd.model.llama4 import Llama4
from herd.ops.pick import paged, ways


class Runner:
    """A model on its device."""

    def __init__(self, model: Llama4, pages: Pages) -> None:
        self.model = model.eval().requires_grad_(False)
        here = [way.name for way in ways("step", model.norm.weight.device.type, model.norm.weight.dtype)]
        self.whole = WholeStep.bind(model, pages) if "native" in here else None  # None where the model has to run layer by layer
        self.graphs = Graphs.bind(model, pages) if "graphs" in here else None

    @torch.inference_mode()
    def see(self, plan: Plan) -> None:
        """Encode the images whose patches come up in this step, once each."""
        device = self.model.norm.weight.device
        for piece in plan.pieces:
            sequence = piece.sequence
            for image in sequence.chain.images:
                if image.first < piece.stop and image.last >= piece.start and image.first not in sequence.encoded:
                    seen = self.model.see(torch.from_numpy(image.tiles.pixels).to(device))
                    if sequence.features is None:
                        sequence.features = seen.new_empty(len(sequence.patches), seen.shape[1])
                    sequence.features[sequence.patches_between(image.first, image.last + 1)] = seen
                    sequence.encoded.add(image.first)

    @torch.inference_mode()
    def __call__(self, inputs: Inputs) -> Tensor:
        """Logits of the wanted rows: [n, V] float32."""
        if self.whole is not None:
            return self.whole(inputs)
        if self.graphs is not None and inputs.keep is None and self.graphs.takes(inputs):
            return self.graphs(inputs)
        attend = paged(inputs.attend)
        states = self.model.states(inputs.tokens, inputs.positions, attend, inputs.features, patches=inputs.patches)
        if inputs.keep is not None:
            inputs.keep(self.model.norm, states)
        return self.model.logits(states[inputs.rows])
