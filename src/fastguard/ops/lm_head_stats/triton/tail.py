# mypy: disallow-untyped-defs=False
# (the arguments of a kernel are pointers and scalars of Triton's own; only constexprs can be annotated)
"""What the dropped columns add: a mass for each row, and its products with the warm columns."""

from __future__ import annotations

import triton.language as tl

import triton


@triton.jit
def tail_of(p_grads, p_saved, p_kept, p_kept_mean, o_n, m_n, N, n_kept, scale):
    """What the dropped columns of the rows o_n add to each row's sum of dlogits before the soft-cap's slope: [R].

    kept, kept_mean [n_kept, N]: what `dlogit_kernel` summed of the listed ones.
    """
    b_kept = tl.zeros_like(o_n).to(tl.float32)
    b_kept_mean = tl.zeros_like(b_kept)
    o_kept = o_n.to(tl.int64)
    for _ in range(n_kept):
        b_kept += tl.load(p_kept + o_kept, mask=m_n, other=0.0)
        if p_kept_mean is not None:
            b_kept_mean += tl.load(p_kept_mean + o_kept, mask=m_n, other=0.0)
        o_kept += N
    b_dropped = tl.maximum(1.0 - b_kept, 0.0)
    b_tail = tl.zeros_like(b_kept)
    if p_grads.lse is not None:
        b_lse = tl.load(p_saved.lse + o_n, mask=m_n, other=0.0)
        b_share = tl.exp(tl.load(p_saved.rest_lse + o_n, mask=m_n, other=0.0) - b_lse)
        b_tail += tl.load(p_grads.lse + o_n, mask=m_n, other=0.0) * b_share * b_dropped
    if p_grads.rest_lse is not None:
        b_tail += tl.load(p_grads.rest_lse + o_n, mask=m_n, other=0.0) * b_dropped
    if p_grads.mean_logit is not None:
        b_tail += tl.load(p_grads.mean_logit + o_n, mask=m_n, other=0.0) * (1.0 - b_kept_mean)
    return b_tail * scale


@triton.jit
def tail_kernel(
    p_grads, p_saved, p_kept, p_kept_mean, p_x, p_shrink, p_out, p_sum, N, D, n_kept, scale,
    TILE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out [T, D] and sum [T]: over the rows of a tile, tail times x and tail, times shrink."""
    i_tile, i_d = tl.program_id(0), tl.program_id(1)
    o_n = i_tile * TILE + tl.arange(0, TILE)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_n = o_n < N
    b_tail = tail_of(p_grads, p_saved, p_kept, p_kept_mean, o_n, m_n, N, n_kept, scale)
    b_tail *= tl.load(p_shrink) if p_shrink is not None else 1.0
    m = m_n[:, None] & (o_d < D)[None, :]
    b_x = tl.load(p_x + o_n.to(tl.int64)[:, None] * D + o_d[None, :], mask=m, other=0.0).to(tl.float32)
    tl.store(p_out + i_tile.to(tl.int64) * D + o_d, tl.sum(b_tail[:, None] * b_x, 0), mask=o_d < D)
    tl.store(p_sum + i_tile, tl.sum(b_tail, 0))  # all programs of the tile the same


@triton.jit
def add_rows_kernel(p_rows, p_index, p_out, D, BLOCK_D: tl.constexpr):
    """out[index] += rows [K, D]; indices differ."""
    i_row = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    p = p_out + tl.load(p_index + i_row) * D + o_d
    b = tl.load(p, mask=o_d < D) + tl.load(p_rows + i_row * D + o_d, mask=o_d < D)
    tl.store(p, b, mask=o_d < D)
