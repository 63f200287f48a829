"""From logits to tokens. Each sequence has its own sampler and its own random numbers, so its draws depend on nobody else's."""

import secrets
from collections.abc import Sequence

import torch
from torch import Tensor

from herd.chat import Sampling
from herd.ops.pick import sample
from herd.ops.sample import Draw


class Sampler:
    """Draws one sequence's tokens. The steps, in order: temperature, top_k, top_p, min_p, one draw."""

    def __init__(self, sampling: Sampling) -> None:
        """sampling: with a temperature and a top_p."""
        self.sampling = sampling
        seed = sampling.seed if sampling.seed is not None else secrets.randbits(63)
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, logits: Tensor) -> int:
        """logits: [V] float32 -> a token. Temperature 0 takes the likeliest, the lowest id on a tie. Raises `HerdError` on NaNs."""
        s = self.sampling
        assert s.temperature is not None and s.top_p is not None
        point = float(torch.rand((), generator=self.generator, dtype=torch.float64)) if s.temperature else 0.0
        return sample(logits, Draw(temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, min_p=s.min_p, point=point))

    def draw(self, logits: Tensor, drafts: Sequence[int] = ()) -> list[int]:
        """Draw after each draft for as long as the one before was right: [1 + drafts, V] -> one token more than were right.

        One random number for each token that comes out, so the tokens are those that would be drawn without drafts.
        """
        drawn: list[int] = []
        for row, draft in zip(logits, (*drafts, None), strict=True):
            drawn.append(self(row))
            if drawn[-1] != draft:
                break
        return drawn
