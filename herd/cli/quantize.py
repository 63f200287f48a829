"""Make a checkpoint small and print what each part loses by it.

int4: all matrices of the layers, embedding and head in int8. fp8: those of the feed-forward layers, experts included. The rest as it is.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from herd.checkpoint.quantize import quantize_checkpoint


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """SRC is a path or a model name; DST must not exist yet. The table: error over the rms weight, of all weights and of the worst one."""

    src: Annotated[Positional[str], arg(metavar="SRC")]  # a folder (herd, Hugging Face, Meta), a .gguf file, or a name
    dst: Annotated[Positional[Path], arg(metavar="DST")]  # folder to make, in herd's format
    to: Literal["int4", "fp8"]  # the numbers to write: 4 bits, or 8-bit floats with a scale for each row
    group: Literal[32, 128] = 32  # int4: columns that share a scale; 128 takes less room, 32 errs less
    minimum: FlagCreatePairsOff[bool] = False  # int4: a minimum for each group as well; a little more room, less error


def run(options: Options) -> int:
    errors = quantize_checkpoint(options.src, options.dst, options.to, group=options.group, with_minimum=options.minimum)
    print(f"{'part':<12}{'tensors':>8}{'weights':>18}  {'kind':<24}{'rms error':>10}{'largest':>10}")
    for (part, kind), error in errors.items():
        rms, largest = error.relative
        print(f"{part:<12}{error.num_tensors:>8}{error.num_weights:>18,}  {kind:<24}{rms:10.5f}{largest:10.3f}")
    print(options.dst)
    return 0
