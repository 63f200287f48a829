"""Convert a checkpoint of any kind that herd reads; memory stays small whatever the size."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from tyro.conf import Positional, arg

from herd.checkpoint.convert import convert


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """SRC is a path or a model name; DST must not exist, or be an empty folder."""

    src: Annotated[Positional[str], arg(metavar="SRC")]  # a folder (herd, Hugging Face, Meta), a .gguf file, or a name
    dst: Annotated[Positional[Path], arg(metavar="DST")]  # folder to make, or file for gguf
    to: Literal["herd", "hf", "meta", "gguf"]  # the kind to write
    dtype: Literal["float32", "float16", "bfloat16"] | None = None  # of the weights; by default as they are, quantized ones included


def run(options: Options) -> int:
    convert(options.src, options.dst, options.to, dtype=getattr(torch, options.dtype) if options.dtype else None)
    print(options.dst)
    return 0
