"""The product with blocks on a GPU: two Triton kernels that read the blocks of `herd/ops/int4.py` where they lie.

The activations keep their dtype, every sum is float32, and a weight is never rounded: its code is exact in bfloat16 and float16, and scale
and minimum are applied to the float32 sum over a group. The definition is x @ dequantize(blocks).T.

Four bytes of a block, (vector v, row r), are one 32-bit word: eight codes of 4 bits or four of 8 bits, of neighbouring columns. So a
matrix is read as int32 words and float16 numbers through two views of the same memory, and

    int4   column v * 8 + c of the group is at bit 8 * (c % 4) + 4 * (c // 4)      int8   column v * 4 + c is at bit 8 * c

`_one_row` is for a few rows: a program streams one strip (8 rows of the matrix, contiguous) past one row of x, as decoding wants it.
`_tile` is for many: a program makes a tile of the output with `tl.dot`, one group of columns at a time.
Both find the expert of their rows from `counts` on the device, so nobody waits for it and the launch fits a CUDA graph.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from herd.ops.int4 import ROWS, Kind, kind_of

FEW = 4  # rows up to which `_one_row` is taken
STEP_WORDS = 128  # words of each row that `_one_row` takes in one go: 1,024 columns of 4 bits
TILE_COLUMNS = 64  # rows of the matrix, columns of the output, of a tile


def product(x: Tensor, blocks: Tensor, counts: Tensor | None = None) -> Tensor:
    """x [R, K] times blocks [N/8, K/g, B] -> [R, N]; or, sorted by expert, times [E, N/8, K/g, B] with counts [E]."""
    kind = kind_of(blocks)
    *experts, strips, groups, _ = blocks.shape
    R, K = x.shape
    num_experts = experts[0] if experts else 0
    assert groups * kind.group == K and blocks.is_contiguous() and (counts is None) == (num_experts == 0)
    y = x.new_empty(R, strips * ROWS)
    if not R:
        return y
    x = x.contiguous()
    tensors = (x, blocks.view(torch.int32), blocks.view(torch.float16), x if counts is None else counts.contiguous(), y)
    facts = {"E": num_experts, "E_PADDED": triton.next_power_of_2(max(num_experts, 1)), **_facts(kind)}
    if R <= FEW:
        with torch.cuda.device_of(x):  # triton launches on the current device
            _one_row[(R, strips)](*tensors, R, strips, groups, STEP_WORDS=STEP_WORDS, **facts)
        return y
    is_exact = x.dtype == torch.float32  # tl.dot must not round it to tf32
    num_matrices = max(num_experts, 1)
    tile_rows = 64 if R / num_matrices > 16 and not is_exact else 16  # float32 takes twice the shared memory
    num_tiles = R // tile_rows + min(R, num_matrices)  # no expert adds more than one tile that is not full
    grid = (num_tiles, triton.cdiv(strips * ROWS, TILE_COLUMNS))
    with torch.cuda.device_of(x):
        _tile[grid](*tensors, R, strips, groups, TILE_ROWS=tile_rows, TILE_COLUMNS=TILE_COLUMNS, IS_EXACT=is_exact, **facts)
    return y


def _facts(kind: Kind) -> dict[str, int | bool]:
    """What a kernel is compiled for."""
    return {
        "BITS": kind.bits,
        "HAS_MINIMUM": kind.has_minimum,
        "BLOCK_BYTES": kind.block_bytes,
        "CODE_BYTES": kind.code_bytes,
        "PER_WORD": 32 // kind.bits,
        "GROUP_WORDS": kind.group * kind.bits // 32,  # of one row
        "enable_fp_fusion": True,
    }


@triton.jit
def _codes(words, BITS: tl.constexpr, HAS_MINIMUM: tl.constexpr, PER_WORD: tl.constexpr):
    """Words [n, w] int32 -> signed codes [n, w, PER_WORD] int32; without a minimum, code 8 of 4 bits stands for 0."""
    c = tl.arange(0, PER_WORD)[None, None, :]
    if BITS == 4:
        codes = (words[:, :, None] >> (c % 4 * 8 + c // 4 * 4)) & 15
        return codes if HAS_MINIMUM else codes - 8
    return (((words[:, :, None] >> (c * 8)) & 255) ^ 128) - 128


@triton.jit
def _rows_of(counts, tile, R, TILE_ROWS: tl.constexpr, E: tl.constexpr, E_PADDED: tl.constexpr):
    """Expert and rows [start, stop) of a tile; no rows for the tiles past the last."""
    if E == 0:
        return 0, tile * TILE_ROWS, tl.minimum(tile * TILE_ROWS + TILE_ROWS, R)
    e = tl.arange(0, E_PADDED)
    rows = tl.load(counts + e, mask=e < E, other=0).to(tl.int32)
    tiles = (rows + TILE_ROWS - 1) // TILE_ROWS
    expert = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    before = e < expert
    start = tl.sum(tl.where(before, rows, 0), 0) + (tile - tl.sum(tl.where(before, tiles, 0), 0)) * TILE_ROWS
    stop = tl.minimum(start + TILE_ROWS, tl.sum(tl.where(e <= expert, rows, 0), 0))
    return expert, start, tl.where(expert < E, stop, start)


@triton.jit
def _one_row(
    x,
    words,
    numbers,
    counts,
    y,
    R,
    strips,
    groups,
    E: tl.constexpr,
    E_PADDED: tl.constexpr,
    BITS: tl.constexpr,
    HAS_MINIMUM: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    CODE_BYTES: tl.constexpr,
    PER_WORD: tl.constexpr,
    GROUP_WORDS: tl.constexpr,
    STEP_WORDS: tl.constexpr,
):
    """One row of x times the 8 rows of one strip."""
    row, strip = tl.program_id(0), tl.program_id(1)
    expert, _, _ = _rows_of(counts, row, R, 1, E, E_PADDED)
    first = (expert * strips + strip).to(tl.int64) * groups  # block of the strip
    r = tl.arange(0, 8)[:, None]
    c = tl.arange(0, PER_WORD)[None, :]
    K = groups * GROUP_WORDS * PER_WORD
    sums = tl.zeros((8, STEP_WORDS), dtype=tl.float32)
    for start in range(0, groups * GROUP_WORDS, STEP_WORDS):
        w = start + tl.arange(0, STEP_WORDS)
        column = w[:, None] * PER_WORD + c
        part = tl.load(x + row.to(tl.int64) * K + column, mask=column < K, other=0).to(tl.float32)  # [w, c]
        block, v = (first + w // GROUP_WORDS)[None, :], (w % GROUP_WORDS)[None, :]
        inside = (w < groups * GROUP_WORDS)[None, :]
        codes = _codes(tl.load(words + block * (BLOCK_BYTES // 4) + v * 8 + r, mask=inside, other=0), BITS, HAS_MINIMUM, PER_WORD)
        number = numbers + block * (BLOCK_BYTES // 2) + CODE_BYTES // 2 + r
        scale = tl.load(number, mask=inside, other=0).to(tl.float32)
        sums += tl.sum(codes.to(tl.float32) * part[None, :, :], 2) * scale
        if HAS_MINIMUM:
            sums += tl.load(number + 8, mask=inside, other=0).to(tl.float32) * tl.sum(part, 1)[None, :]
    out = y + (row.to(tl.int64) * strips + strip) * 8 + tl.arange(0, 8)
    tl.store(out, tl.sum(sums, 1).to(y.dtype.element_ty))


@triton.jit
def _tile(
    x,
    words,
    numbers,
    counts,
    y,
    R,
    strips,
    groups,
    E: tl.constexpr,
    E_PADDED: tl.constexpr,
    BITS: tl.constexpr,
    HAS_MINIMUM: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    CODE_BYTES: tl.constexpr,
    PER_WORD: tl.constexpr,
    GROUP_WORDS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    IS_EXACT: tl.constexpr,
):
    """TILE_ROWS rows of x, all of one expert, times TILE_COLUMNS rows of its matrix."""
    expert, start, stop = _rows_of(counts, tl.program_id(0), R, TILE_ROWS, E, E_PADDED)
    if start >= stop:
        return
    GROUP: tl.constexpr = GROUP_WORDS * PER_WORD
    K, N = groups * GROUP, strips * 8
    row = start + tl.arange(0, TILE_ROWS)
    n = tl.program_id(1) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    v, column = tl.arange(0, GROUP_WORDS), tl.arange(0, GROUP)
    first = (expert * strips + n // 8).to(tl.int64) * groups
    sums = tl.zeros((TILE_ROWS, TILE_COLUMNS), dtype=tl.float32)
    for group in range(groups):
        at = x + row.to(tl.int64)[:, None] * K + group * GROUP + column[None, :]
        part = tl.load(at, mask=(row < stop)[:, None], other=0)  # [rows, g]
        block = first + group
        word = words + block[:, None] * (BLOCK_BYTES // 4) + v[None, :] * 8 + (n % 8)[:, None]
        codes = _codes(tl.load(word, mask=(n < N)[:, None], other=0), BITS, HAS_MINIMUM, PER_WORD)
        matrix = tl.reshape(codes, (TILE_COLUMNS, GROUP)).to(part.dtype)
        number = numbers + block * (BLOCK_BYTES // 2) + CODE_BYTES // 2 + n % 8
        scale = tl.load(number, mask=n < N, other=0).to(tl.float32)
        if IS_EXACT:
            sums += tl.dot(part, tl.trans(matrix), input_precision="ieee") * scale[None, :]
        else:
            sums += tl.dot(part, tl.trans(matrix)) * scale[None, :]
        if HAS_MINIMUM:
            minimum = tl.load(number + 8, mask=n < N, other=0).to(tl.float32)
            sums += tl.sum(part.to(tl.float32), 1)[:, None] * minimum[None, :]
    out = y + row.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out, sums.to(y.dtype.element_ty), mask=(row < stop)[:, None] & (n < N)[None, :])
