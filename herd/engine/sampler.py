"""From logits to a token. Each sequence has its own sampler and its own random numbers, so its draws depend on nobody else's."""

import secrets

import torch
from torch import Tensor

from herd.chat import Sampling


class Sampler:
    """Draws one sequence's tokens. The steps, in order: temperature, top_k, top_p, min_p, one draw."""

    def __init__(self, sampling: Sampling) -> None:
        """sampling: with a temperature and a top_p."""
        self.sampling = sampling
        seed = sampling.seed if sampling.seed is not None else secrets.randbits(63)
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, logits: Tensor) -> int:
        """logits: [V] float32 -> a token. Temperature 0 takes the likeliest, the lowest id on a tie."""
        if self.sampling.temperature == 0:
            return int(logits.argmax())
        kept, ids = distribution(logits, self.sampling)
        point = torch.rand((), generator=self.generator, dtype=torch.float64)
        cumulative = kept.cumsum(0)
        place = torch.searchsorted(cumulative, point.to(cumulative.device) * cumulative[-1], right=True)
        return int(ids[place.clamp(max=len(ids) - 1)])


def distribution(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """What is left to draw from: probabilities [n] float64, descending and not renormalised, and their tokens [n].

    top_p keeps the token that crosses the threshold, so that at least one is always left; min_p is relative to the likeliest.
    Source: transformers' TopPLogitsWarper and MinPLogitsWarper (arXiv 2407.01082).
    """
    assert sampling.temperature is not None and sampling.top_p is not None
    logits = (logits.double() - logits.max()) / sampling.temperature  # from the top, so that no temperature overflows
    k = min(sampling.top_k or len(logits), len(logits))
    top, ids = logits.topk(k) if k < len(logits) else logits.sort(descending=True, stable=True)
    probs = (top - top.logsumexp(0)).exp()
    keep = probs.cumsum(0) - probs < sampling.top_p
    keep &= probs >= sampling.min_p * probs[0]
    keep[0] = True
    return probs[keep], ids[keep]
