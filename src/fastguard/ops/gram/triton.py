# mypy: disallow-untyped-defs=False
# (the arguments of a kernel are pointers and scalars of Triton's own; only constexprs can be annotated)
"""``gram_`` on GPUs, in Triton; float64 matrices are handed to ``portable.py``.

A program makes one tile on or below the diagonal and stores it twice. Where there are too few tiles to fill a GPU, the
rows are divided among parts, which a second kernel adds in order.

Prefixes: p_ pointer, o_ offsets, m_ mask, b_ block of values. Shapes: N rows of B samples, I features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

import triton
from fastguard.ops import table
from fastguard.ops.gram import portable
from fastguard.ops.launch import chip, on_device

PROGRAMS = 256
"""Programs that fill a GPU."""
CHUNK = 512
"""Rows that a part takes at a time."""


class Blocks(NamedTuple):
    """Shape of a program: features on either side, rows at a time, warps, pipeline stages."""

    features: int
    rows: int
    warps: int
    stages: int


def config(dtype: torch.dtype, width: int, chip: table.Chip) -> Blocks:
    """The shape of a program for x of a dtype and of ``width`` features on a chip."""
    return table.find("gram", table.classes(dtype, width), chip, Blocks)


@triton.jit
def join(p_gram, b_acc, tile_row, tile_column, o_r, o_c, width):
    """Add a tile to the matrix, on both sides of the diagonal; of the matrix, the lower half alone is read."""
    m = (o_r < width)[:, None] & (o_c < width)[None, :]
    p_lower = p_gram + o_r.to(tl.int64)[:, None] * width + o_c[None, :]
    b_acc += tl.load(p_lower, mask=m, other=0.0)
    b_mirrored = tl.trans(b_acc)
    if tile_row == tile_column:
        b_acc = tl.where(o_r[:, None] >= o_c[None, :], b_acc, b_mirrored)
    tl.store(p_lower, b_acc, mask=m)
    p_upper = p_gram + o_c.to(tl.int64)[:, None] * width + o_r[None, :]
    tl.store(p_upper, b_mirrored, mask=(o_c < width)[:, None] & (o_r < width)[None, :] & (tile_row != tile_column))


@triton.jit
def gram_kernel(
    p_x, p_bounds, p_gram, p_part, B, width, stride, n_parts, chunk, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """gram [I, I], or the tiles of part [n_parts, I, I] on and below the diagonal; see ``portable.add``."""
    tile_row = tl.program_id(0)
    tile_column = tl.program_id(1)
    part = tl.program_id(2)
    if tile_column <= tile_row:
        o_r = tile_row * BLOCK + tl.arange(0, BLOCK)
        o_c = tile_column * BLOCK + tl.arange(0, BLOCK)
        b_acc = tl.zeros([BLOCK, BLOCK], tl.float32)
        for b in range(B):
            end = tl.load(p_bounds + 2 * b + 1)
            first = tl.load(p_bounds + 2 * b) + (part + b) % n_parts * chunk  # short samples, too, go round
            for start in range(first, end, n_parts * chunk):
                stop = tl.minimum(start + chunk, end)
                for k in range(start, stop, BLOCK_K):
                    o_k = k + tl.arange(0, BLOCK_K)
                    m_k = (o_k < stop)[:, None]
                    p_row = p_x + o_k[:, None] * stride
                    b_r = tl.load(p_row + o_r[None, :], mask=m_k & (o_r < width)[None, :], other=0.0)
                    b_c = tl.load(p_row + o_c[None, :], mask=m_k & (o_c < width)[None, :], other=0.0)
                    b_acc = tl.dot(tl.trans(b_r), b_c, b_acc, input_precision=PRECISION)
        if p_part is None:
            join(p_gram, b_acc, tile_row, tile_column, o_r, o_c, width)
        else:
            p_own = p_part + part.to(tl.int64) * width * width + o_r.to(tl.int64)[:, None] * width + o_c[None, :]
            tl.store(p_own, b_acc, mask=(o_r < width)[:, None] & (o_c < width)[None, :])


@triton.jit
def join_kernel(p_gram, p_part, width, n_parts, BLOCK: tl.constexpr):
    """Add the parts [n_parts, I, I] to gram, in order."""
    tile_row = tl.program_id(0)
    tile_column = tl.program_id(1)
    if tile_column <= tile_row:
        o_r = tile_row * BLOCK + tl.arange(0, BLOCK)
        o_c = tile_column * BLOCK + tl.arange(0, BLOCK)
        m = (o_r < width)[:, None] & (o_c < width)[None, :]
        p_own = p_part + o_r.to(tl.int64)[:, None] * width + o_c[None, :]
        b_sum = tl.zeros([BLOCK, BLOCK], tl.float32)
        for _ in range(n_parts):
            b_sum += tl.load(p_own, mask=m, other=0.0)
            p_own += width * width  # few tiles: it fits 32 bits
        join(p_gram, b_sum, tile_row, tile_column, o_r, o_c, width)


@on_device
def add(gram: Tensor, x: Tensor, bounds: Tensor) -> None:
    """See ``portable.add``."""
    if gram.dtype == torch.float64:
        portable.add(gram, x, bounds)
        return
    width = gram.shape[0]
    blocks = config(x.dtype, width, chip(x.device))
    side = triton.cdiv(width, blocks.features)
    parts = min(triton.cdiv(PROGRAMS, side * (side + 1) // 2), triton.cdiv(x.shape[0], CHUNK))
    partial = None if parts == 1 else torch.empty(parts, width, width, device=x.device)
    gram_kernel[(side, side, parts)](
        x, bounds, gram, partial, bounds.shape[0], width, x.stride(0), parts, x.shape[0] if parts == 1 else CHUNK,
        BLOCK=blocks.features, BLOCK_K=blocks.rows, PRECISION="tf32x3" if x.dtype == torch.float32 else "ieee",
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    if partial is not None:
        small = triton.cdiv(width, 64)
        join_kernel[(small, small)](gram, partial, width, parts, BLOCK=64, num_warps=4)
