"""From a plan to tensors: the packed tokens of a step and where each kind of layer writes and reads."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from herd.engine.pages import Pages
from herd.engine.scheduler import Piece, Plan
from herd.model.config import ModelConfig
from herd.ops.attend import Paged, Reach

Keep = Callable[[Callable[[Tensor], Tensor], Tensor], None]  # (the model's last norm, states [T, D])


@dataclass(frozen=True, slots=True)
class Inputs:
    """One forward of the model."""

    tokens: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    rows: Tensor  # [n] which of T give logits
    starts: list[int]  # position of each sequence's first new token
    attend: Paged
    features: Tensor | None  # [n, D] of images
    patches: Tensor  # [n] which of the T they replace
    keep: Keep | None = None  # is given the states after the last layer, where somebody wants them


def build_inputs(plan: Plan, pages: Pages, model: ModelConfig) -> Inputs:
    """Lay the pieces of `plan` end to end. Features of their images must have been made."""
    device = pages.device
    pieces = plan.pieces
    tokens = [token for p in pieces for token in p.tokens]
    positions = [position for p in pieces for position in range(p.start, p.stop)]
    rows: list[int] = []
    patches: list[int] = []
    seen: list[Tensor] = []
    total = 0
    for piece in pieces:
        found = piece.sequence.patches_between(piece.start, piece.stop)
        if found.start < found.stop:
            assert piece.sequence.features is not None, "images are seen before their patches are computed"
            seen.append(piece.sequence.features[found])
            patches += [total + position - piece.start for position in piece.sequence.patches[found]]
        total += piece.stop - piece.start
        rows += range(total - piece.num_rows, total)
    return Inputs(
        tokens=torch.tensor(tokens, device=device),
        positions=torch.tensor(positions, device=device),
        rows=torch.tensor(rows, dtype=torch.int64, device=device),
        starts=[p.start for p in pieces],
        attend=Paged(
            pages.layers,
            [p.stop - p.start for p in pieces],
            local=reach(pieces, pages, model.chunk_tokens, is_local=True) if pages.has_local else None,
            full=reach(pieces, pages, None, is_local=False) if pages.has_full else None,
        ),
        features=torch.cat(seen) if seen else None,
        patches=torch.tensor(patches, dtype=torch.int64, device=device),
        keep=partial(_take_means, pieces) if any(piece.sequence.mean is not None for piece in pieces) else None,
    )


def _take_means(pieces: list[Piece], norm: Callable[[Tensor], Tensor], states: Tensor) -> None:
    """Take up the states [T, D] of those pieces whose mean is wanted, after the last norm."""
    for piece, part in zip(pieces, torch.split(states, [piece.stop - piece.start for piece in pieces]), strict=True):
        if piece.sequence.mean is not None:
            piece.sequence.mean.add(norm(part), piece.start)


def reach(pieces: list[Piece], pages: Pages, chunk_tokens: int | None, *, is_local: bool) -> Reach:
    """What the pieces see in one kind of layer."""
    origins = [piece.start // chunk_tokens * chunk_tokens if chunk_tokens else 0 for piece in pieces]
    return Reach(
        tables=[piece.sequence.local_table if is_local else piece.sequence.full_table for piece in pieces],
        lengths=[piece.stop - origin for piece, origin in zip(pieces, origins, strict=True)],
        page_tokens=pages.page_tokens,
    )
