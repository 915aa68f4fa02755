# mypy: disallow-untyped-defs=False
# (the arguments of a kernel are pointers and scalars of Triton's own; only constexprs can be annotated)
"""The dropped columns that stand for what was dropped, and their weights."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

import triton
from fastguard.ops.lm_head_stats import live, portable
from fastguard.ops.lm_head_stats.triton.pieces import LIVE, OCTAVE


@triton.jit
def mass_of(b_code):
    """The mass that codes of dropped columns stand for (`live.mass_of_codes`)."""
    return tl.where((b_code > 0) & (b_code < LIVE), tl.exp2((b_code - 254).to(tl.float32) / OCTAVE), 0.0)


@triton.jit
def floor_kernel(p_codes, p_floor, p_weight, stride, V, coverage, BLOCK: tl.constexpr):
    """Of a tile, the code from which its columns hold ``coverage`` of its dropped mass, and one over what they hold."""
    i_row = tl.program_id(0)
    b_counts = tl.zeros([256], dtype=tl.int32)
    for start in range(0, V, BLOCK):
        o = start + tl.arange(0, BLOCK)
        b_code = tl.load(p_codes + i_row.to(tl.int64) * stride + o, mask=o < V, other=0)
        b_counts += tl.histogram(b_code.to(tl.int32), 256)  # absent ones as 0, which weighs nothing
    o_code = tl.arange(0, 256)
    b_held = tl.cumsum(b_counts.to(tl.float32) * mass_of(o_code), 0, reverse=True)  # by this code and those above
    b_total = tl.max(b_held, 0)
    i_floor = tl.maximum(tl.max(tl.where(b_held >= coverage * b_total, o_code, 0), 0), 1)
    tl.store(p_floor + i_row, i_floor)
    tl.store(p_weight + i_row, 1.0 / tl.maximum(tl.sum(tl.where(o_code == i_floor, b_held, 0.0), 0), 1e-38))


@triton.jit
def weigh_kernel(p_codes, p_floor, p_weight, p_total, stride, V, n_tiles, BLOCK: tl.constexpr):
    """total [V]: over the tiles, weight [T] times the mass of a column dropped at floor [T] or more."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < V
    b_total = tl.zeros([BLOCK], dtype=tl.float32)
    p_row = p_codes + o
    for i_tile in range(n_tiles):
        b_code = tl.load(p_row, mask=m, other=0).to(tl.int32)
        p_row += stride
        b_mass = mass_of(b_code) * tl.load(p_weight + i_tile)
        b_total += tl.where(b_code >= tl.load(p_floor + i_tile), b_mass, 0.0)
    tl.store(p_total + o, b_total, mask=m)


def warm_columns(columns: Tensor, rest_lse: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """(warm [K], share [T, K]): the dropped columns that stand for a tile's tail, of all tiles, and their weights.

    A tile's own are its heaviest, up to COVERAGE of its dropped mass; of all tiles' the WARM heaviest. What is none
    of a tile's weighs 0; the soft-cap's slope is in.
    """
    tiles, v = columns.shape
    floor = torch.empty(tiles, dtype=torch.int32, device=columns.device)
    weight, total = (torch.empty(n, dtype=torch.float32, device=columns.device) for n in (tiles, v))
    floor_kernel[tiles,](columns, floor, weight, columns.stride(0), v, live.COVERAGE, BLOCK=2048)
    weigh_kernel[triton.cdiv(v, 1024),](columns, floor, weight, total, columns.stride(0), v, tiles, BLOCK=1024)
    warm = total.sort(descending=True, stable=True).indices[: live.WARM]
    picked = columns.index_select(1, warm)
    mass = live.mass_of_codes(columns.device).float()
    share = mass[picked.int()] * (picked >= floor[:, None])
    share = share / share.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return warm, share * portable.slope_of_tiles(picked, rest_lse, softcap) if softcap else share
