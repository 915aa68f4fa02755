# mypy: disallow-untyped-defs=False
# (the arguments of a kernel are pointers and scalars of Triton's own; only constexprs can be annotated)
"""The gradient of the hidden states."""

from __future__ import annotations

import triton.language as tl

import triton
from fastguard.ops.lm_head_stats.triton.tail import tail_of


@triton.jit
def dx_kernel(
    p_grads, p_saved, p_dlogit, p_weight, p_index, p_count, p_kept, p_kept_mean, p_tail_row, p_shrink, p_dx,
    N, D, n_places, stride_index, first, n_kept, scale,
    TILE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx [N, D] of one tile's listed columns from the ``first`` on: (dlogit^T @ weight[index]) * shrink.

    Added to dx unless ``first`` is 0; a tile whose list has ended before is left alone. With its last columns comes its
    tail times tail_row [T, D].
    """
    i_tile, i_d = tl.program_id(0), tl.program_id(1)
    n_listed = tl.load(p_count + i_tile) - first
    if (n_listed <= 0) & (first > 0):
        return
    o_t = tl.arange(0, TILE)
    o_n = i_tile * TILE + o_t
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_n, m_d = o_n < N, o_d < D
    m = m_n[:, None] & m_d[None, :]
    p_out = p_dx + o_n.to(tl.int64)[:, None] * D + o_d[None, :]
    b_shrink = tl.load(p_shrink) if p_shrink is not None else 1.0  # a power of two
    b_acc = tl.load(p_out, mask=m & (first > 0), other=0.0) / b_shrink
    if n_listed <= n_places:
        b_tail = tail_of(p_grads, p_saved, p_kept, p_kept_mean, o_n, m_n, N, n_kept, scale)
        b_row = tl.load(p_tail_row + i_tile.to(tl.int64) * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_acc += b_tail[:, None] * b_row[None, :]
    p_list = p_index + i_tile.to(tl.int64) * stride_index + first
    p_block = p_dlogit + i_tile.to(tl.int64) * n_places * TILE
    n_here = tl.minimum(n_listed, n_places)
    for c in range(0, n_here, BLOCK_C):
        o_c = c + tl.arange(0, BLOCK_C)
        b_index = tl.load(p_list + o_c, mask=o_c < n_here, other=0).to(tl.int64)
        b_w = tl.load(p_weight + b_index[:, None] * D + o_d[None, :], mask=m_d[None, :], other=0.0)
        b_d = tl.load(p_block + o_c[:, None] * TILE + o_t[None, :])
        b_acc = tl.dot(tl.trans(b_d), b_w, b_acc, input_precision=PRECISION)
    tl.store(p_out, b_acc * b_shrink, mask=m)
