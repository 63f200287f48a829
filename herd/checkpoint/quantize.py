"""A checkpoint of any format into herd's own with its matrices in int4 and int8 or in fp8, streaming, and the error that this makes.

A quantized tensor is a promise like any other: its codes are made from the floats piece by piece when the writer asks for them.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from herd.checkpoint.convert import write
from herd.checkpoint.load import open_model
from herd.checkpoint.rounding import Measure, blocks_of, float8_of
from herd.checkpoint.source import Source, Stored, of_blocks
from herd.errors import CheckpointError, UsageError, nearest
from herd.log import log
from herd.ops.int4 import ROWS, dequantize
from herd.quant import fp8
from herd.quant.int4 import PARTS, part_of, plan

NUMBERS = ("int4", "fp8")


@dataclass(slots=True)
class Error:
    """What rounding did to the tensors of one part of a model that became one kind of codes."""

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


def quantize_checkpoint(
    src: str | Path, dst: Path, to: str = "int4", *, group: int = 32, with_minimum: bool = False
) -> dict[tuple[str, str], Error]:
    """Read the checkpoint at a path or of a short name and write it to the folder `dst` quantized; (part, kind) -> what it lost.

    to: "int4" or "fp8".  group, with_minimum: of int4. Tensors that are as wanted already are kept, code for code, and are not counted.
    Raises as `convert` does, and `CheckpointError` for weights that are not finite or of which none can be quantized.
    """
    if to not in NUMBERS:
        raise UsageError(f"no numbers are called {to!r}", nearest(to, NUMBERS) or f"there are: {', '.join(NUMBERS)}")
    if to == "fp8" and (group != 32 or with_minimum):
        raise UsageError("fp8 has neither groups nor minimums: a row has one scale", "leave out --group and --minimum")
    errors: dict[tuple[str, str], Error] = {}
    seen: set[str] = set()

    def measure(name: str, kind: str, piece: Tensor, rounded: Tensor) -> None:
        error = errors.setdefault((part_of(name) or name, kind), Error())
        error.num_tensors += name not in seen
        seen.add(name)
        error.add(piece, rounded)

    source = open_model(src)
    made = quantized(source, group, with_minimum, measure) if to == "int4" else quantized_fp8(source, measure)
    if made.packed_bytes > source.packed_bytes:
        what = "%s makes this checkpoint larger: %s bytes of weights, which now take %s; its %s is the smaller already"
        kinds = sorted({stored.quantization for stored in source.tensors.values() if stored.quantization})
        log.warning(what, to, f"{made.packed_bytes:,}", f"{source.packed_bytes:,}", ", ".join(kinds) or "form")
    write(made, dst, "herd")
    return dict(sorted(errors.items(), key=lambda item: PARTS.index(item[0][0])))


def quantized(source: Source, group: int = 32, with_minimum: bool = False, measure: Measure | None = None) -> Source:
    """The same checkpoint with the matrices of `plan` as blocks, made when they are read. measure: told every piece once it is made."""
    planned = plan({name: stored.shape for name, stored in source.tensors.items()}, group, with_minimum)
    if not planned.kinds:
        raise CheckpointError(f"no matrix of the model divides into blocks of {ROWS} rows by {group} columns", "try --group 32")
    if planned.unfit:
        about = (len(planned.unfit), ROWS, group, planned.unfit[0])
        log.warning("%d matrices do not divide into blocks of %d rows by %d columns and stay as they are: %s, ...", *about)
    made = {}
    for name, kind in planned.kinds.items():
        stored = source.tensors[name]
        if stored.kind == kind:
            continue
        if stored.near is not None and of_blocks(stored.near).kind == kind:
            made[name] = of_blocks(_measured(name, stored, stored.near, measure))
        else:
            made[name] = of_blocks(blocks_of(name, stored, kind, measure))
    return _with(source, made)


def quantized_fp8(source: Source, measure: Measure | None = None) -> Source:
    """The same checkpoint with the matrices of `fp8.plan` as 8-bit floats, a scale for each row. measure: as for `quantized`."""
    planned = fp8.plan(source.tensors)
    found = {name: stored for name in planned if not _has_row_scales(stored := source.tensors[name])}
    return _with(source, {name: float8_of(name, stored, measure) for name, stored in found.items()})


def _has_row_scales(stored: Stored) -> bool:
    return stored.float8 is not None and stored.float8.scale.shape[-1] == 1


def _with(source: Source, made: dict[str, Stored]) -> Source:
    """The source with some of its tensors in other codes; a warning names the codes that they were in before."""
    if again := sorted({before for name in made if (before := source.tensors[name].quantization)}):
        log.warning("the weights are quantized already (%s); quantizing them again adds to their error", ", ".join(again))
    return replace(source, tensors={**source.tensors, **made})


def _measured(name: str, stored: Stored, blocks: Stored, measure: Measure | None) -> Stored:
    """Blocks that are there already, and what they make of the numbers told to `measure`."""
    kind, step = str(of_blocks(blocks).kind), ROWS if len(stored.shape) == 2 else 1

    def rows(start: int, stop: int) -> Tensor:
        piece = blocks.rows(start, stop)
        if measure is not None:
            measure(name, kind, stored.rows(start * step, stop * step).float(), dequantize(piece))
        return piece

    return replace(blocks, rows=rows)
