"""A checkpoint of any format into herd's own with its matrices in int4 and int8, streaming, and the error that this makes.

A quantized tensor is a promise like any other: its blocks are made from the floats piece by piece when the writer asks for them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from herd.checkpoint.convert import write
from herd.checkpoint.load import open_model
from herd.checkpoint.source import Source, Stored, of_blocks
from herd.errors import CheckpointError
from herd.log import log
from herd.ops.int4 import ROWS, Kind, dequantize
from herd.quant.int4 import PARTS, part_of, plan, quantize

Measure = Callable[[str, Kind, Tensor, Tensor], None]  # told a tensor's name and new kind, a piece, and what the codes make of it


@dataclass(slots=True)
class Error:
    """What rounding did to the tensors of one part of a model that became one kind of blocks."""

    num_tensors: int = 0
    num_weights: int = 0
    squared_weight: float = 0.0
    squared_error: float = 0.0
    largest_error: float = 0.0

    def add(self, piece: Tensor, rounded: Tensor) -> None:
        difference = rounded.sub_(piece)
        self.num_weights += piece.numel()
        self.squared_weight += _squared(piece)
        self.squared_error += _squared(difference)
        self.largest_error = max(self.largest_error, difference.abs().max().item())

    @property
    def relative(self) -> tuple[float, float]:
        """(rms, largest) error over the rms weight."""
        rms = math.sqrt(self.squared_weight / max(1, self.num_weights)) or 1.0
        return math.sqrt(self.squared_error / max(1, self.num_weights)) / rms, self.largest_error / rms


def _squared(matrix: Tensor) -> float:
    """Sum of squares: float32 within a row, float64 over the rows, which is as good as float64 throughout and 30 times faster."""
    return float(torch.linalg.vector_norm(matrix, dim=-1).double().square().sum())


def quantize_checkpoint(src: str | Path, dst: Path, *, group: int = 32, with_minimum: bool = False) -> dict[tuple[str, str], Error]:
    """Read the checkpoint at a path or of a short name and write it to the folder `dst` quantized; (part, kind) -> what it lost.

    Tensors that are in the wanted blocks already are kept as they are, code for code, and are not counted.
    Raises as `convert` does, and `CheckpointError` for weights that are not finite or of which none fits into blocks.
    """
    errors: dict[tuple[str, str], Error] = {}
    seen: set[str] = set()

    def measure(name: str, kind: Kind, piece: Tensor, rounded: Tensor) -> None:
        error = errors.setdefault((part_of(name) or name, str(kind)), Error())
        error.num_tensors += name not in seen
        seen.add(name)
        error.add(piece, rounded)

    write(quantized(open_model(src), group, with_minimum, measure), dst, "herd")
    return dict(sorted(errors.items(), key=lambda item: PARTS.index(item[0][0])))


def quantized(source: Source, group: int = 32, with_minimum: bool = False, measure: Measure | None = None) -> Source:
    """The same checkpoint with the matrices of `plan` as blocks, made when they are read. measure: told every piece once it is made."""
    planned = plan({name: stored.shape for name, stored in source.tensors.items()}, group, with_minimum)
    if not planned.kinds:
        raise CheckpointError(f"no matrix of the model divides into blocks of {ROWS} rows by {group} columns", "try --group 32")
    if planned.unfit:
        about = (len(planned.unfit), ROWS, group, planned.unfit[0])
        log.warning("%d matrices do not divide into blocks of %d rows by %d columns and stay as they are: %s, ...", *about)
    tensors, again = dict(source.tensors), set()
    for name, kind in planned.kinds.items():
        stored = source.tensors[name]
        if stored.kind == kind:
            continue
        if before := str(stored.kind or stored.rounded):
            again.add(before)
        tensors[name] = _quantized(name, stored, kind, measure)
    if again:
        log.warning("the weights are quantized already (%s); quantizing them again adds to their error", ", ".join(sorted(again)))
    return replace(source, tensors=tensors)


def _quantized(name: str, stored: Stored, kind: Kind, measure: Measure | None) -> Stored:
    step = ROWS if len(stored.shape) == 2 else 1  # rows of the matrix for one of its blocks'

    def rows(start: int, stop: int) -> Tensor:
        piece = stored.rows(start * step, stop * step).float()
        blocks = quantize(piece, kind, name=name)
        if measure is not None:
            measure(name, kind, piece, dequantize(blocks))
        return blocks

    return of_blocks(Stored(kind.blocks_shape(stored.shape), torch.uint8, rows))
