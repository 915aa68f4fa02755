# mypy: disallow-untyped-defs=False
# (the arguments of a kernel are pointers and scalars of Triton's own; only constexprs can be annotated)
"""The dropped columns that stand for what was dropped, and how much that is."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

import triton
from fastguard.ops.lm_head_stats import live, portable
from fastguard.ops.lm_head_stats.op import Grads, Saved
from fastguard.ops.lm_head_stats.triton.pieces import LIVE, OCTAVE


@triton.jit
def count_kernel(p_codes, p_counts, stride, n_columns, BLOCK: tl.constexpr):
    """counts [T, 256] int32: how often each code occurs in a row of codes."""
    i_row = tl.program_id(0)
    b_counts = tl.zeros([256], dtype=tl.int32)
    for start in range(0, n_columns, BLOCK):
        o = start + tl.arange(0, BLOCK)
        b_code = tl.load(p_codes + i_row.to(tl.int64) * stride + o, mask=o < n_columns, other=0)
        b_counts += tl.histogram(b_code.to(tl.int32), 256)  # absent ones as 0, which weighs nothing
    tl.store(p_counts + i_row * 256 + tl.arange(0, 256), b_counts)


@triton.jit
def weigh_kernel(p_codes, p_floor, p_weight, p_total, stride, n_columns, n_tiles, BLOCK: tl.constexpr):
    """total [n_columns]: over the tiles, weight [T] times the mass of a column dropped at floor [T] or more."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < n_columns
    b_total = tl.zeros([BLOCK], dtype=tl.float32)
    p_row = p_codes + o
    for i_tile in range(n_tiles):
        b_code = tl.load(p_row, mask=m, other=0).to(tl.int32)
        p_row += stride
        b_mass = tl.exp2((b_code - 254).to(tl.float32) / OCTAVE) * tl.load(p_weight + i_tile)
        b_total += tl.where((b_code >= tl.load(p_floor + i_tile)) & (b_code < LIVE), b_mass, 0.0)
    tl.store(p_total + o, b_total, mask=m)


@triton.jit
def tail_kernel(p_tail, p_x, p_out, N, D, TILE: tl.constexpr, BLOCK_D: tl.constexpr):
    """out [T, D] = sum over the rows of a tile of tail * x."""
    i_tile, i_d = tl.program_id(0), tl.program_id(1)
    o_n = i_tile * TILE + tl.arange(0, TILE)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m = (o_n < N)[:, None] & (o_d < D)[None, :]
    b_x = tl.load(p_x + o_n.to(tl.int64)[:, None] * D + o_d[None, :], mask=m, other=0.0).to(tl.float32)
    b_tail = tl.load(p_tail + o_n, mask=o_n < N, other=0.0)
    tl.store(p_out + i_tile.to(tl.int64) * D + o_d, tl.sum(b_tail[:, None] * b_x, 0), mask=o_d < D)


def warm_columns(columns: Tensor, counts: Tensor, rest_lse: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """(warm [K], share [T, K]): the dropped columns that stand for a tile's tail, of all tiles, and their weights.

    A tile's own are its heaviest, up to COVERAGE of its dropped mass; of all tiles' the WARM heaviest. What is none
    of a tile's weighs 0; the soft-cap's slope is in. counts [T, 256]: how often each code occurs.
    """
    mass = live.mass_of_codes(columns.device).float()
    heaviest_first = (counts * mass).flip(1).cumsum(1)
    floor = (255 - (heaviest_first < live.COVERAGE * heaviest_first[:, -1:]).sum(1, keepdim=True)).clamp_min(1)
    tiny = torch.finfo(torch.float32).tiny
    weight = 1 / heaviest_first.gather(1, 255 - floor).clamp_min(tiny)
    total = torch.empty(columns.shape[1], device=columns.device)
    weigh_kernel[triton.cdiv(len(total), 1024),](
        columns, floor.int(), weight, total, columns.stride(0), len(total), columns.shape[0], BLOCK=1024
    )
    warm = total.sort(descending=True, stable=True).indices[: live.WARM]
    picked = columns[:, warm]
    share = mass[picked.int()] * (picked >= floor)
    share = share / share.sum(1, keepdim=True).clamp_min(tiny)
    return warm, share * portable.slope_of_tiles(picked, rest_lse, softcap) if softcap else share


def _tail_mass(grads: Grads, saved: Saved, kept_rest: Tensor, kept_mean: Tensor) -> Tensor:
    """What the dropped columns add to each row's sum of dlogits before soft-cap and scale: [N]."""
    dropped = (1 - kept_rest).clamp_min(0.0)
    tail = torch.zeros_like(dropped)
    if grads.lse is not None:
        tail += grads.lse * torch.exp(saved.rest_lse - saved.lse) * dropped
    if grads.rest_lse is not None:
        tail += grads.rest_lse * dropped
    if grads.mean_logit is not None:
        tail += grads.mean_logit * (1 - kept_mean)
    return tail
