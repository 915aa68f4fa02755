# mypy: disallow-untyped-defs=False
# (the arguments of a kernel are pointers and scalars of Triton's own; only constexprs can be annotated)
"""Which columns are live in which tile, as lists; the columns in the order in which dW is computed."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

import triton
from fastguard.ops.lm_head_stats.triton.pieces import LIVE


@triton.jit
def compact_kernel(p_codes, p_index, p_place, p_count, stride, V, BLOCK: tl.constexpr):
    """List the live columns of one tile: `Lists` of codes [T, stride]."""
    i_row = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, BLOCK)
    n = 0
    for start in range(0, V, BLOCK):
        m = start + o < V
        b_live = (tl.load(p_codes + i_row * stride + start + o, mask=m, other=0) == LIVE).to(tl.int32)
        b_place = n + tl.cumsum(b_live, 0) - 1
        if p_place is not None:
            tl.store(p_place + i_row * V + start + o, tl.where(b_live > 0, b_place, -1), mask=m)
        tl.store(p_index + i_row * V + b_place, start + o, mask=b_live > 0)
        n += tl.sum(b_live, 0)
    tl.store(p_count + i_row, n)


@triton.jit
def order_kernel(p_place, p_key, V, n_tiles, BLOCK: tl.constexpr):
    """key [V] int32: sorts columns live in a quarter of the tiles first, the others by first and last tile."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < V
    b_count = tl.zeros([BLOCK], dtype=tl.int32)
    b_first = tl.full([BLOCK], 0, tl.int32) + n_tiles
    b_last = tl.zeros([BLOCK], dtype=tl.int32)
    p_row = p_place + o
    for i_tile in range(n_tiles):
        m_live = tl.load(p_row, mask=m, other=-1) >= 0
        p_row += V
        b_count += m_live.to(tl.int32)
        b_first = tl.where(m_live, tl.minimum(b_first, i_tile), b_first)
        b_last = tl.where(m_live, i_tile, b_last)
    b_key = tl.where(4 * b_count >= n_tiles, 0, 1 + b_first * n_tiles + b_last)
    tl.store(p_key + o, b_key, mask=m)


@triton.jit
def wanted_kernel(
    p_place, p_column, p_most, p_tile, p_n_tiles, V, n_places, n_tiles, first,
    COLUMNS: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """tile [blocks, T], n_tiles [blocks]: in which tiles a block of columns has a place in [first, first + n_places).

    Nothing is written where no list (``most``: the longest) comes so far.
    """
    if tl.load(p_most) <= first:
        return
    i_block = tl.program_id(0).to(tl.int64)
    o_c = i_block * COLUMNS + tl.arange(0, COLUMNS)
    b_column = tl.load(p_column + o_c, mask=o_c < V, other=0)
    n = 0
    for start in range(0, n_tiles, BLOCK_T):
        o_t = start + tl.arange(0, BLOCK_T)
        m = (o_t < n_tiles)[:, None] & (o_c < V)[None, :]
        b_slot = tl.load(p_place + o_t.to(tl.int64)[:, None] * V + b_column[None, :], mask=m, other=-1) - first
        b_any = tl.max(((b_slot >= 0) & (b_slot < n_places)).to(tl.int32), 1)
        tl.store(p_tile + i_block * n_tiles + n + tl.cumsum(b_any, 0) - 1, o_t, mask=b_any > 0)
        n += tl.sum(b_any, 0)
    tl.store(p_n_tiles + i_block, n)


class Lists(NamedTuple):
    """The live columns of each tile.

    listed [T, V]: columns of W, ascending, of which n_listed [T] are given; place [T, V]: each column's place among
    them, -1 for none, or None where nobody asks; most []: the longest list.
    """

    listed: Tensor
    n_listed: Tensor
    place: Tensor | None
    most: Tensor


def lists_of(columns: Tensor, with_places: bool) -> Lists:
    """`Lists` of the codes [T, V]."""
    tiles, v = columns.shape
    listed = torch.empty(tiles, v, dtype=torch.int32, device=columns.device)
    place = torch.empty_like(listed) if with_places else None
    n_listed = torch.empty(tiles, dtype=torch.int32, device=columns.device)
    compact_kernel[tiles,](columns, listed, place, n_listed, columns.stride(0), v, BLOCK=2048)
    return Lists(listed, n_listed, place, n_listed.amax())


def in_order(place: Tensor) -> Tensor:
    """The columns [V] int32 in an order in which neighbours are live in the same tiles."""
    tiles, v = place.shape
    key = torch.empty(v, dtype=torch.int32, device=place.device)
    order_kernel[triton.cdiv(v, 1024),](place, key, v, tiles, BLOCK=1024)
    return torch.sort(key, stable=True).indices.int()
