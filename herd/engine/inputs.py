"""From a plan to tensors: the packed tokens of a step and where each kind of layer writes and reads."""

from dataclasses import dataclass

import torch
from torch import Tensor

from herd.engine.pages import Pages
from herd.engine.scheduler import Piece, Plan
from herd.model.config import ModelConfig
from herd.ops.attend import Paged, Reach


@dataclass(frozen=True, slots=True)
class Inputs:
    """One forward of the model."""

    tokens: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    rows: Tensor  # [n] which of T give logits
    attend: Paged
    features: Tensor | None  # [n, D] of images
    patches: Tensor  # [n] which of the T they replace


def build_inputs(plan: Plan, pages: Pages, model: ModelConfig) -> Inputs:
    """Lay the pieces of `plan` end to end. Features of their images must have been made."""
    device = pages.keys[0].device
    pieces = plan.pieces
    tokens = [token for p in pieces for token in p.sequence.tokens[p.start : p.stop]]
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
        if piece.is_due:
            rows.append(total - 1)
    return Inputs(
        tokens=torch.tensor(tokens, device=device),
        positions=torch.tensor(positions, device=device),
        rows=torch.tensor(rows, dtype=torch.int64, device=device),
        attend=Paged(
            pages.keys,
            pages.values,
            [p.stop - p.start for p in pieces],
            local=reach(pieces, pages, model.chunk_tokens, is_local=True) if model.local_layers else None,
            full=reach(pieces, pages, None, is_local=False) if model.global_layers else None,
        ),
        features=torch.cat(seen) if seen else None,
        patches=torch.tensor(patches, dtype=torch.int64, device=device),
    )


def reach(pieces: list[Piece], pages: Pages, chunk_tokens: int | None, *, is_local: bool) -> Reach:
    """Slots that the pieces write and read in one kind of layer."""
    device = pages.keys[0].device
    read, write = [], []
    for piece in pieces:
        origin = piece.start // chunk_tokens * chunk_tokens if chunk_tokens else 0
        table = piece.sequence.local_table if is_local else piece.sequence.full_table
        slots = pages.slots(table, piece.stop - origin)
        read.append(slots.to(device))
        write.append(slots[piece.start - origin :])
    return Reach(write=torch.cat(write).to(device), read=read)
