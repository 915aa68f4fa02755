# mypy: disallow-untyped-defs=False
# (the arguments of a kernel are pointers and scalars of Triton's own; only constexprs can be annotated)
"""What the parts of a scan come to: statistics of rows, live columns of tiles."""

from __future__ import annotations

import triton.language as tl

import triton
from fastguard.ops.lm_head_stats.triton.pieces import LIVE, NEGATIVE, OCTAVE, THRESHOLDS


@triton.jit
def combine_kernel(
    p_parts, p_target, p_target_logit, p_lse, p_rest, p_mean, p_least, p_columns, N, stride_columns, n_parts,
    filter_tol, top, TILE: tl.constexpr,
):  # fmt: skip
    """Sum the parts of one tile: lse, rest, mean [N]; least [T]: the code that columns live from. Marks the targets."""
    i_tile = tl.program_id(0)
    o_n = i_tile * TILE + tl.arange(0, TILE)
    m_n = o_n < N
    b_max = tl.full([TILE], NEGATIVE, tl.float32)
    b_sum = tl.zeros([TILE], dtype=tl.float32)
    b_moment = tl.zeros([TILE], dtype=tl.float32)
    b_drop = tl.zeros([TILE, THRESHOLDS], dtype=tl.float32)
    o_k = tl.arange(0, THRESHOLDS)
    o_part = o_n.to(tl.int64)
    for _ in range(n_parts):
        b_part = tl.load(p_parts.maximum + o_part, mask=m_n, other=0.0)
        b_new = tl.maximum(b_max, b_part)
        b_old, b_part = tl.exp(b_max - b_new), tl.exp(b_part - b_new)
        b_max = b_new
        b_sum = b_sum * b_old + b_part * tl.load(p_parts.total + o_part, mask=m_n, other=0.0)
        if p_parts.moment is not None:
            b_moment = b_moment * b_old + b_part * tl.load(p_parts.moment + o_part, mask=m_n, other=0.0)
        if p_parts.dropped is not None:
            p_drop = p_parts.dropped + o_part[:, None] * THRESHOLDS + o_k[None, :]
            b_drop = b_drop * b_old[:, None] + b_part[:, None] * tl.load(p_drop, mask=m_n[:, None], other=0.0)
        o_part += N
    b_target_logit = tl.load(p_target_logit + o_n, mask=m_n, other=0.0)
    b_rest = b_max + tl.log(b_sum)
    b_top = tl.maximum(b_rest, b_target_logit)
    b_lse = b_top + tl.log(tl.exp(b_rest - b_top) + tl.exp(b_target_logit - b_top))
    tl.store(p_lse + o_n, b_lse, mask=m_n)
    tl.store(p_rest + o_n, b_rest, mask=m_n)
    b_floor = tl.maximum(b_sum, 1e-30)
    if p_parts.moment is not None:
        b_mean = tl.exp(b_rest - b_lse) * b_moment / b_floor + tl.exp(b_target_logit - b_lse) * b_target_logit
        tl.store(p_mean + o_n, b_mean, mask=m_n)
    if p_parts.dropped is not None:
        m_over = m_n[:, None] & (b_drop > (filter_tol * b_floor)[:, None])  # not of NaN
        b_over = tl.max(m_over.to(tl.int32), 0)
        i_step = tl.min(tl.where(b_over == 0, o_k, THRESHOLDS), 0)
        tl.store(p_least + i_tile, tl.where(i_step < THRESHOLDS, tl.maximum(top - OCTAVE * i_step, 0), 0))
        b_target = tl.load(p_target + o_n, mask=m_n, other=0)
        p_marked = p_columns + i_tile.to(tl.int64) * stride_columns + b_target
        tl.store(p_marked, tl.full([TILE], LIVE, tl.int32).to(tl.uint8), mask=m_n)


@triton.jit
def mark_kernel(p_columns, p_least, V, stride_columns, BLOCK: tl.constexpr):
    """Give the columns of a tile whose code is at least the tile's the code LIVE, in place."""
    i_tile = tl.program_id(0)
    o_v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_v = o_v < V
    p_code = p_columns + i_tile.to(tl.int64) * stride_columns + o_v
    m_live = m_v & (tl.load(p_code, mask=m_v, other=0).to(tl.int32) >= tl.load(p_least + i_tile))
    tl.store(p_code, tl.full([BLOCK], LIVE, tl.int32).to(tl.uint8), mask=m_live)
