"""What every format becomes when it is opened, and what every format is written from: a `Source` of lazy tensors.

    path -> open_source -> Source(config, tensors, files) -> load_model | a writer

A `Stored` tensor is a promise: `rows(a, b)` reads those rows of dim 0 and nothing else, so a conversion streams pieces and never holds a
model. In every format a tensor is bytes at an offset of a file (`Region`). Two ways to them: conversions read with plain reads, whose
memory is gone with the piece; loading maps the file, so weights that need no change cost no copy.

A quantized matrix has two faces: `rows` gives floats, as of any other, so every writer and the plain model can take it; the other is its
codes, for whoever keeps them: `blocks` as `herd/ops/int4.py` lays them out, or 8-bit floats and their scales. What was quantized in a way
that herd has no kernels for has blocks `near` it instead, made when they are read, for whoever would rather lose a little than take the
room of floats.
"""

import ctypes
import dataclasses
import math
import mmap
import os
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from herd.errors import CheckpointError
from herd.log import log
from herd.model.config import ModelConfig, RopeScaling
from herd.model.llama4 import Llama4
from herd.ops.fp8 import FP8
from herd.ops.int4 import KINDS, ROWS, Kind, dequantize

assert sys.byteorder == "little", "every checkpoint format is little-endian, and so must the machine be"

PIECE_BYTES = 256 << 20  # most that one piece of a 1-D or 2-D tensor takes

# Beside the weights, a checkpoint carries these; they are copied as they are.
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
)


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor that is somewhere else."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: Callable[[int, int], Tensor]  # rows [a, b) of dim 0, freshly read and contiguous
    view: Callable[[], Tensor] | None = None  # the whole without a copy, where the file has it as it is
    blocks: "Stored | None" = None  # a quantized matrix as its blocks, uint8 [.., N / 8, K / g, B]
    float8: "Float8 | None" = None  # a matrix of 8-bit floats as they are
    near: "Stored | None" = None  # where there are no blocks that hold its numbers: blocks that hold nearly those
    rounded: str = ""  # the quantization that its values went through and that no blocks hold: "Q6_K", "float8"

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """The whole tensor, a copy."""
        return self.rows(0, self.shape[0])

    def pieces(self, first: int = 0, last: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) from front to back: experts one by one, else as many rows as fit in `PIECE_BYTES`, codes counted as floats.

        first, last: of all rows only these, [first, last).
        """
        last = self.shape[0] if last is None else last
        is_blocks = self.dtype == torch.uint8
        is_experts = len(self.shape) == (4 if is_blocks else 3)
        row_bytes = self.num_bytes // self.shape[0] * (8 if self.dtype in (torch.uint8, torch.int32, FP8) else 1)
        step = 1 if is_experts else max(1, PIECE_BYTES // max(1, row_bytes))
        for start in range(first, last, step):
            yield start, self.rows(start, min(start + step, last))

    def to(self, dtype: torch.dtype) -> "Stored":
        """The same tensor as plain numbers of a dtype."""
        if dtype == self.dtype and not self.quantization:
            return self
        return Stored(self.shape, dtype, lambda a, b: self.rows(a, b).to(dtype))

    @property
    def kind(self) -> Kind | None:
        """The kind of the blocks, None for plain numbers."""
        return None if self.blocks is None else KINDS[self.blocks.shape[-1]]

    @property
    def quantization(self) -> str:
        """What it is quantized as, "" if it is not: "int4 group 32", "float8", "Q6_K"."""
        return str(self.kind or self.rounded)

    @property
    def packed_bytes(self) -> int:
        """Of the blocks or 8-bit floats where there are any, else of the numbers."""
        if self.float8 is not None:
            return self.float8.weight.num_bytes + self.float8.scale.num_bytes
        return (self.blocks or self).num_bytes


@dataclass(frozen=True, slots=True)
class Float8:
    """A matrix [.., N, K] of 8-bit floats; `herd/ops/fp8.py` says what they mean."""

    weight: Stored  # [.., N, K] float8_e4m3fn
    scale: Stored  # [.., N, n] float32


def held(tensor: Tensor) -> Stored:
    """A tensor that is in memory already, as a `Stored`."""
    return Stored(tuple(tensor.shape), tensor.dtype, lambda a, b: tensor[a:b].contiguous(), lambda: tensor)


def of_blocks(blocks: Stored) -> Stored:
    """A matrix, or experts, of which there are blocks: dequantized by rows."""
    shape = KINDS[blocks.shape[-1]].matrix_shape(blocks.shape)

    def rows(start: int, stop: int) -> Tensor:
        if len(shape) == 3:
            return dequantize(blocks.rows(start, stop))
        first = start // ROWS
        return dequantize(blocks.rows(first, -(-stop // ROWS)))[start - first * ROWS : stop - first * ROWS]

    return Stored(shape, torch.float32, rows, blocks=blocks)


def _mapped(descriptor: int, first: int, num_bytes: int) -> "ctypes.Array[ctypes.c_char]":
    """Part of a file as memory that this process may write to and no other sees; unmapped when nobody refers to it.

    `mmap.mmap` keeps a descriptor open for every map until Python 3.13, one for each tensor, and a process may have 1,024 as a rule.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    map_, unmap = libc.mmap, libc.munmap
    map_.restype, map_.argtypes, unmap.argtypes = pointer, [pointer, size, number, number, number, ctypes.c_int64], [pointer, size]
    address = map_(None, num_bytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE, descriptor, first)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    pages = (ctypes.c_char * num_bytes).from_address(address)
    weakref.finalize(pages, unmap, address, num_bytes).atexit = False
    return pages


@dataclass(frozen=True, slots=True)
class Region:
    """A contiguous tensor at a place in a file."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) by plain reads. Raises `CheckpointError` when the file ends too early."""
        out = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset + start * row_bytes)
            rest = memoryview(out.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
            while rest:
                count = file.readinto(rest)
                if not count:
                    raise CheckpointError(
                        f"{self.path} ends {len(rest):,} bytes before the tensor at {self.offset:,} does", "fetch the file again"
                    )
                rest = rest[count:]
        return out

    def view(self) -> Tensor:
        """The whole tensor over the mapped file: pages come when touched; a write stays in this process."""
        first = self.offset - self.offset % mmap.ALLOCATIONGRANULARITY
        with self.path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < self.offset + self.num_bytes:
                raise CheckpointError(f"{self.path} ends before the tensor at {self.offset:,} does", "fetch the file again")
            pages = _mapped(file.fileno(), first, self.offset - first + self.num_bytes)
        return torch.frombuffer(pages, dtype=self.dtype, count=math.prod(self.shape), offset=self.offset - first).view(self.shape)

    def stored(self) -> Stored:
        return Stored(self.shape, self.dtype, self.rows, self.view)


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """An opened checkpoint: its facts, its tensors under herd's names and in herd's layout, and the files of its tokenizer."""

    config: ModelConfig
    tensors: Mapping[str, Stored]  # exactly the keys of `Llama4(config).state_dict()`
    files: Mapping[str, bytes] = field(default_factory=dict)  # name -> content: tokenizer, chat template, image settings
    kind: str  # "herd", "hf", "meta", "gguf" or "memory"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that most of the weights have, quantized ones left out where there are others."""
        plain = [stored for stored in self.tensors.values() if not stored.quantization]
        amounts: dict[torch.dtype, int] = {}
        for stored in plain or self.tensors.values():
            amounts[stored.dtype] = amounts.get(stored.dtype, 0) + stored.num_bytes
        return max(amounts, key=amounts.__getitem__)

    @property
    def num_bytes(self) -> int:
        """Of all tensors as plain numbers."""
        return sum(stored.num_bytes for stored in self.tensors.values())

    @property
    def packed_bytes(self) -> int:
        """The same where blocks and 8-bit floats stay what they are."""
        return sum(stored.packed_bytes for stored in self.tensors.values())

    def to(self, dtype: torch.dtype) -> "Source":
        """The same checkpoint with every tensor as plain numbers of `dtype`."""
        return dataclasses.replace(self, tensors={name: stored.to(dtype) for name, stored in self.tensors.items()})


def of_model(model: Llama4, files: Mapping[str, bytes]) -> Source:
    """A model in memory as a `Source`, ready for any writer. files: from `Tokenizer.files()`."""
    tensors = {name: held(tensor.detach().cpu()) for name, tensor in model.state_dict().items()}
    return Source(config=model.config, tensors=tensors, files=files, kind="memory")


def chat_format(files: Mapping[str, bytes]) -> str:
    """ "chatml" when the tokenizer's files speak of `<|im_start|>` and not of Llama 4's headers, else "llama4"."""
    text = b"".join(files.values())
    return "chatml" if b"<|im_start|>" in text and b"<|header_start|>" not in text else "llama4"


_FIRST_RELEASE = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_tokens=8192)


def mend_rope(config: ModelConfig, where: str) -> ModelConfig:
    """Scout's config first came out with RoPE scaling 8/1/4, was corrected to 16/1/1, and the wrong one lives on in many files.

    That very mistake is replaced, with a warning; any other value for a Scout is kept, with a warning. Source: llama-models#322.
    """
    scaling = config.rope_scaling
    if config.num_experts != 16 or not config.qk_norm or scaling is None or scaling == RopeScaling():
        return config
    if scaling == _FIRST_RELEASE:
        log.warning("%s: RoPE scaling 8/1/4 is the mistake of Scout's first release; using 16/1/1 instead", where)
        return dataclasses.replace(config, rope_scaling=RopeScaling())
    found = "/".join(f"{x:g}" for x in (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor))
    log.warning("%s: RoPE scaling %s, original context %d; Scout has 16/1/1, 8192. Kept as it is", where, found, scaling.original_tokens)
    return config


# Facts that change how a model is talked to, not what it computes: a format without a place for them is still written.
_SOFT = {"context_tokens", "bos_id", "stop_ids", "pad_id", "patch_id", "chat_format", "tied", "vision.max_tiles"}
_SOFT |= {"advised_temperature", "advised_top_p"}


def check_expressible(config: ModelConfig, read_back: ModelConfig, format: str) -> None:
    """Compare a config with what a reader of the written format will see.

    A difference in the mathematics is a `CheckpointError` that lists every one, ours and theirs; a difference in ids, context or chat
    format is one warning.
    """
    hard: list[str] = []
    soft: list[str] = []
    unused = set() if config.num_experts else {"hidden_width", "moe_step"}
    unused |= set() if config.vision else {"patch_id"}
    for name, ours, theirs in _differences(config, read_back):
        if name not in unused:
            (soft if name in _SOFT else hard).append(f"{name} is {ours} (there {theirs})")
    if hard:
        raise CheckpointError(f"{format} cannot express this model: {'; '.join(hard)}", "herd's own format can: --to herd")
    if soft:
        log.warning("%s has no place for some facts, and its readers will assume others: %s", format, "; ".join(soft))


def _differences(ours: object, theirs: object, prefix: str = "") -> Iterator[tuple[str, object, object]]:
    for f in dataclasses.fields(ours):  # type: ignore[arg-type]
        a, b = getattr(ours, f.name), getattr(theirs, f.name)
        if dataclasses.is_dataclass(a) and dataclasses.is_dataclass(b):
            yield from _differences(a, b, f"{prefix}{f.name}.")
        elif a != b:
            yield f"{prefix}{f.name}", a, b
