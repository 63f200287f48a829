"""From logits to a token, plain: temperature, top_k, top_p, min_p, one draw.

A token's weight is 2^42 * e^((its logit - the largest) / temperature), rounded to a whole number. Sums of whole numbers are exact and have
no order, so what top_p keeps and which token a draw meets do not depend on how somebody adds up. What it costs: a token that is less likely
than 2^-43 of the likeliest is never drawn.

Kept tokens lie end to end, and the draw is a place on that line. Where top_k or top_p limits them they lie in descending order, the lowest
id first among equals; else in the order of ids, which takes no sort.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from herd.errors import HerdError

WEIGHT_BITS = 42  # weight of the likeliest token; sums of 2^21 weights fit 63 bits


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """How one token is drawn: all but the logits."""

    temperature: float  # 0 takes the likeliest
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    min_p: float = 0.0
    point: float  # uniform in [0, 1)

    @property
    def scale(self) -> float:
        """Halvings of the weight per unit of logit; infinite at temperature 0, finite at every other."""
        return math.inf if self.temperature == 0 else min(math.log2(math.e) / self.temperature, 1e300)

    @property
    def least(self) -> int:
        """The least weight that min_p keeps."""
        return math.ceil(math.ldexp(self.min_p, WEIGHT_BITS))


def sample_plain(logits: Tensor, draw: Draw) -> int:
    """The definition: logits [V] float32 -> a token. -inf is a token that cannot be; raises `HerdError` where none can be."""
    if not bool(logits.amax().isfinite()):  # a NaN is the largest of all
        raise not_numbers()
    if draw.temperature == 0:
        return int(logits.argmax())
    weights, ids = kept(logits, draw)
    cumulative = weights.cumsum(0)
    total = int(cumulative[-1])
    target = min(int(draw.point * float(total)), total - 1)
    return int(ids[torch.searchsorted(cumulative, target, right=True)])


def kept(logits: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
    """What is left to draw from, in the order of the line: weights [n] int64 and their tokens [n].

    top_p keeps the token that crosses the threshold, so that at least one is always left; min_p is relative to the likeliest.
    Source: transformers' TopPLogitsWarper and MinPLogitsWarper (arXiv 2407.01082).
    """
    most = logits.amax().double()
    ids = torch.arange(len(logits), device=logits.device)
    if 0 < draw.top_k < len(logits) or draw.top_p < 1:
        logits, ids = logits.sort(descending=True, stable=True)
        logits, ids = logits[: draw.top_k or None], ids[: draw.top_k or None]
    weights = (((logits.double() - most) * draw.scale).exp2() * 2.0**WEIGHT_BITS).round().long()
    keep = weights >= draw.least
    if draw.top_p < 1:
        before = weights.cumsum(0) - weights
        keep &= before < max(math.ceil(draw.top_p * float(weights.sum())), 1)
    return weights[keep], ids[keep]


def mask_plain(logits: Tensor, bits: Tensor) -> None:
    """Set the logits [V] of tokens whose bit is 0 to -inf, in place. bits: [V/32] int32, the lowest first."""
    places = torch.arange(32, dtype=torch.int32, device=logits.device)
    allowed = (bits.to(logits.device)[:, None] >> places & 1).flatten()[: len(logits)]
    logits.masked_fill_(allowed == 0, -math.inf)


def not_numbers() -> HerdError:
    """The error of logits from which nothing can be drawn."""
    return HerdError("the model's logits hold a NaN or +inf, or are all -inf", "its weights may be damaged or overflow in their dtype")
