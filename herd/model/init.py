"""Random weights for a model that starts from nothing."""

import torch

from herd.model.llama4 import Llama4


@torch.no_grad()
def init_weights(model: Llama4, seed: int = 0, std: float = 0.02) -> Llama4:
    """Matrices from N(0, std^2), norms 1, biases 0. Same seed, same weights. Source: `initializer_range` of the released configs.

    Class embedding and positions of the vision encoder: N(0, 1/W). Source: transformers' `Llama4VisionModel`.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if name in ("vision.cls", "vision.positions"):
            p.copy_(torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5)
        elif p.dim() > 1:
            p.copy_(torch.randn(p.shape, generator=generator) * std)
        else:
            p.fill_(0.0 if name.endswith("bias") else 1.0)
    return model
