"""Meta's shards: how a tensor is cut over the files of a checkpoint, and where it lies in each file.

A .pth is a zip of a pickle and raw storages. The pickle is read with `weights_only`, under fake tensors: that yields names, shapes and
the place of every storage in the file and reads no weights, so a tensor becomes a region of the file as in the other formats.

How shards make a whole (`names.py` has the column): cut along one dim, or the same in every shard. Traps: q, k, v and gate, up are
fused *within* each shard; experts are flat, [E * in, out / shards], and a plain concatenation of `moe_w_out_eF_D` interleaves them
wrongly. Source: llama_models/checkpoint.py (reshard_mp).
"""

import io
import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from herd.checkpoint.names import FileTensor
from herd.checkpoint.source import Region, Stored
from herd.errors import CheckpointError

# Values of training and of TransformerEngine that no forward uses. Source: convert_llama4_weights_to_hf.py.
_JUNK = ("._extra_state", "rope.freqs", "gate_stats_3E", "expert_activation_DE")


@dataclass(frozen=True, slots=True)
class Part:
    """One herd tensor in Meta's shards: where its rows are in a shard's tensor."""

    shape: tuple[int, ...]  # herd's
    turned: bool
    split: int | None  # dim of herd's shape that is cut over the shards
    num_shards: int
    first_row: int  # of this part in a shard's fused tensor

    @property
    def local(self) -> tuple[int, ...]:
        """herd's shape within one shard."""
        return tuple(n // self.num_shards if dim == self.split else n for dim, n in enumerate(self.shape))

    @property
    def rows_each(self) -> int:
        """Rows in a shard's tensor for one row of herd's: an expert is many, since experts are flat."""
        return self.local[2] if len(self.shape) == 3 else 1

    def read(self, shards: list[Region], start: int, stop: int) -> Tensor:
        """Rows [start, stop) of herd's tensor, from all shards."""
        if self.split is None:
            shards = shards[:1]
        if self.turned and len(self.shape) == 2:  # the router: few bytes, read whole
            return shards[0].rows(0, self.shape[1]).T[start:stop].contiguous()
        if self.split == 0:
            height = self.local[0]
            spans = [(shard, max(start - i * height, 0), min(stop - i * height, height)) for i, shard in enumerate(shards)]
            return torch.cat([shard.rows(self.first_row + a, self.first_row + b) for shard, a, b in spans if a < b])
        pieces = [shard.rows(self.first_row + start * self.rows_each, self.first_row + stop * self.rows_each) for shard in shards]
        if len(self.shape) == 3:
            pieces = [piece.view(stop - start, self.rows_each, -1).transpose(1, 2) for piece in pieces]  # [experts, out, in]
        return pieces[0].contiguous() if self.split is None else torch.cat(pieces, dim=self.split)

    def cut(self, piece: Tensor, start: int) -> list[tuple[int, int, Tensor]]:
        """The other way: rows from `start` on of herd's tensor as (shard, row there, rows), for every shard that gets some."""
        stop, count = start + len(piece), self.num_shards
        if self.turned and len(self.shape) == 2:
            assert len(piece) == self.shape[0], "a router comes in one piece"
            return [(i, 0, piece.T) for i in range(count)]
        if self.split == 0:
            height = self.local[0]
            spans = [(i, max(start, i * height), min(stop, (i + 1) * height)) for i in range(count)]
            return [(i, self.first_row + a - i * height, piece[a - start : b - start]) for i, a, b in spans if a < b]
        parts = [piece] * count if self.split is None else list(piece.chunk(count, dim=self.split))
        if len(self.shape) == 3:
            parts = [part.transpose(1, 2).flatten(0, 1) for part in parts]
        return [(i, self.first_row + start * self.rows_each, part) for i, part in enumerate(parts)]


def parts_of(t: FileTensor, shapes: Mapping[str, tuple[int, ...]], num_shards: int) -> dict[str, Part]:
    found, first_row = {}, 0
    for herd in t.herd:
        found[herd] = Part(shapes[herd], t.turned, t.split, num_shards, first_row)
        first_row += found[herd].local[0]
    return found


def shard_shape(t: FileTensor, shapes: Mapping[str, tuple[int, ...]], num_shards: int) -> tuple[int, ...]:
    """The shape of a tensor in each shard's file."""
    parts = list(parts_of(t, shapes, num_shards).values())
    local = parts[0].local
    if len(local) == 3:
        return (local[0] * local[2], local[1])
    if t.turned:
        return (local[1], local[0])
    return (sum(part.local[0] for part in parts), *local[1:])


def stored_of(part: Part, shards: list[Region]) -> Stored:
    view = None
    if not part.turned and (part.split is None or len(shards) == 1):  # the rows lie in one file as herd has them
        row_bytes = math.prod(part.shape[1:]) * shards[0].dtype.itemsize
        view = Region(shards[0].path, shards[0].offset + part.first_row * row_bytes, part.shape, shards[0].dtype).view
    return Stored(part.shape, shards[0].dtype, lambda a, b: part.read(shards, a, b), view)


def regions_of(path: Path) -> dict[str, Region]:
    """Name -> place of every tensor in a .pth, the junk left out."""
    again = "fetch the file again"
    try:
        with torch.serialization.safe_globals([io.BytesIO]), FakeTensorMode():
            state = torch.load(path, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = next((line.strip() for line in str(error).splitlines() if "nsupported" in line or "GLOBAL" in line), "")
        raise CheckpointError(
            f"{path} holds more than tensors; nothing in it was run. {reason}".strip(), "do not trust its source"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        text = str(error).splitlines()[0]
        raise CheckpointError(f"{path} ({path.stat().st_size:,} bytes) is cut short or is no .pth file: {text}", again) from error
    found: dict[str, Region] = {}
    for name, value in dict(state).items():
        if any(junk in name for junk in _JUNK):
            continue
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: {name} is a {type(value).__name__}, not a tensor", again)
        if not value.is_contiguous():
            raise CheckpointError(f"{path}: {name} is stored transposed (strides {value.stride()})", "save it with .contiguous()")
        base = value.untyped_storage()._checkpoint_offset
        assert base is not None, "torch.load under fake tensors notes where a storage lies"
        found[name] = Region(path, base + int(value.storage_offset()) * value.dtype.itemsize, tuple(value.shape), value.dtype)
    return found
