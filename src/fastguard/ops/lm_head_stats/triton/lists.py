# mypy: disallow-untyped-defs=False
# (the arguments of a kernel are pointers and scalars of Triton's own; only constexprs can be annotated)
"""Which columns are live in which tile, as lists; the columns in the order in which dW is computed."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

import triton
from fastguard.ops.lm_head_stats import live
from fastguard.ops.lm_head_stats.triton.configs import COLUMNS
from fastguard.ops.lm_head_stats.triton.pieces import LIVE


class Window(NamedTuple):
    """Live columns of every tile within a range of columns of W.

    listed [T, C]: columns of W; n_listed [T]; column [U]: columns of W in the order in which dW is computed;
    slot [T, U]: their places in ``listed``, -1 for none; tile [blocks, T], n_tiles [blocks]: tiles per block.
    """

    listed: Tensor
    n_listed: Tensor
    column: Tensor
    slot: Tensor
    tile: Tensor
    n_tiles: Tensor


@triton.jit
def compact_kernel(p_codes, p_index, p_place, p_count, stride, n_columns, n_places, first, BLOCK: tl.constexpr):
    """List the columns of one row of codes that equal LIVE.

    codes [T, stride] of which n_columns are read; index [T, n_places]: first + column, ascending;
    place [T, n_columns]: position in the list, -1 for none; count [T].
    """
    i_row = tl.program_id(0)
    o = tl.arange(0, BLOCK)
    n = 0
    for start in range(0, n_columns, BLOCK):
        m = start + o < n_columns
        b_live = (tl.load(p_codes + i_row.to(tl.int64) * stride + start + o, mask=m, other=0) == LIVE).to(tl.int32)
        b_place = n + tl.cumsum(b_live, 0) - 1
        tl.store(p_place + i_row.to(tl.int64) * n_columns + start + o, tl.where(b_live > 0, b_place, -1), mask=m)
        m_live = (b_live > 0) & (b_place < n_places)
        tl.store(p_index + i_row.to(tl.int64) * n_places + b_place, first + start + o, mask=m_live)
        n += tl.sum(b_live, 0)
    tl.store(p_count + i_row, n)


@triton.jit
def order_kernel(p_place, p_key, n_columns, n_tiles, BLOCK: tl.constexpr):
    """key [n_columns] int32: sorts columns live in a quarter of the tiles first, the others by first and last tile."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < n_columns
    b_count = tl.zeros([BLOCK], dtype=tl.int32)
    b_first = tl.full([BLOCK], 0, tl.int32) + n_tiles
    b_last = tl.zeros([BLOCK], dtype=tl.int32)
    p_row = p_place + o
    for i_tile in range(n_tiles):
        m_live = tl.load(p_row, mask=m, other=-1) >= 0
        p_row += n_columns
        b_count += m_live.to(tl.int32)
        b_first = tl.where(m_live, tl.minimum(b_first, i_tile), b_first)
        b_last = tl.where(m_live, i_tile, b_last)
    b_key = tl.where(4 * b_count >= n_tiles, 0, 1 + b_first * n_tiles + b_last)
    tl.store(p_key + o, b_key, mask=m)


def _window(
    columns: Tensor | None,
    first: int,
    end: int,
    tiles: int,
    n_places: int,
    need_weight: bool,
    device: torch.device,
) -> Window:
    """The live columns among [first, end), or all of them."""
    width = end - first
    n_blocks = triton.cdiv(width, COLUMNS)
    empty = torch.empty(0, 0, dtype=torch.int32, device=device)
    if columns is None:
        every = torch.arange(width, dtype=torch.int32, device=device)
        tile = torch.arange(tiles, dtype=torch.int32, device=device).expand(n_blocks, -1)
        full = torch.full((max(tiles, n_blocks),), width, dtype=torch.int32, device=device)
        n_tiles = torch.full((n_blocks,), tiles, dtype=torch.int32, device=device)
        return Window((first + every).expand(tiles, -1), full, first + every, every.expand(tiles, -1), tile, n_tiles)
    index, place, count = _compact(columns[:, first:end], n_places, first)
    if not need_weight:
        return Window(index, count, empty[0:0, 0:0].view(0), empty, empty, empty.view(0))
    key = torch.empty(width, dtype=torch.int32, device=device)
    order_kernel[triton.cdiv(width, 1024),](place, key, width, tiles, BLOCK=1024)
    order = torch.sort(key, stable=True).indices
    slot = place.index_select(1, order)
    del place  # four bytes a (tile, column), as slot is
    missing = n_blocks * COLUMNS - width
    padded = torch.nn.functional.pad(slot, (0, missing), value=-1) if missing else slot
    wanted = (padded >= 0).view(tiles, n_blocks, COLUMNS).any(2).t()
    tile, _, n_tiles = _compact((wanted * live.LIVE).to(torch.uint8).contiguous(), tiles, 0)
    return Window(index, count, (first + order).to(torch.int32), slot, tile, n_tiles)


def _compact(codes: Tensor, n_places: int, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """(index [rows, n_places], place [rows, columns], count [rows]) of the LIVE entries of ``codes``."""
    rows, n_columns = codes.shape
    index = torch.zeros(rows, n_places, dtype=torch.int32, device=codes.device)
    place = torch.empty(rows, n_columns, dtype=torch.int32, device=codes.device)
    count = torch.empty(rows, dtype=torch.int32, device=codes.device)
    compact_kernel[rows,](codes, index, place, count, codes.stride(0), n_columns, n_places, first, BLOCK=2048)
    return index, place, count
