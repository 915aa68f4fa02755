# mypy: disallow-untyped-defs=False
# (the arguments of a kernel are pointers and scalars of Triton's own; only constexprs can be annotated)
"""The gradient of the hidden states."""

from __future__ import annotations

import triton.language as tl

import triton


@triton.jit
def dx_kernel(
    p_dlogit, p_weight, p_index, p_count, p_tail, p_tail_row, p_dx, N, D, n_places, stride_index,
    TILE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx [N, D] = dlogit^T @ weight[index] (+ tail [N] times the tile's tail_row [T, D]); ADD adds to dx."""
    i_tile, i_d = tl.program_id(0), tl.program_id(1)
    n_listed = tl.load(p_count + i_tile)
    o_t = tl.arange(0, TILE)
    o_n = i_tile * TILE + o_t
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    m = (o_n < N)[:, None] & m_d[None, :]
    p_out = p_dx + o_n.to(tl.int64)[:, None] * D + o_d[None, :]
    b_acc = tl.load(p_out, mask=m, other=0.0) if ADD else tl.zeros([TILE, BLOCK_D], dtype=tl.float32)
    if p_tail is not None:
        b_tail = tl.load(p_tail + o_n, mask=o_n < N, other=0.0)
        b_row = tl.load(p_tail_row + i_tile.to(tl.int64) * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_acc += b_tail[:, None] * b_row[None, :]
    p_list = p_index + i_tile.to(tl.int64) * stride_index
    p_block = p_dlogit + i_tile.to(tl.int64) * n_places * TILE
    for c in range(0, n_listed, BLOCK_C):
        o_c = c + tl.arange(0, BLOCK_C)
        b_index = tl.load(p_list + o_c, mask=o_c < n_listed, other=0).to(tl.int64)
        b_w = tl.load(p_weight + b_index[:, None] * D + o_d[None, :], mask=m_d[None, :], other=0.0)
        b_d = tl.load(p_block + o_c[:, None] * TILE + o_t[None, :])
        b_acc = tl.dot(tl.trans(b_d), b_w, b_acc, input_precision=PRECISION)
    tl.store(p_out, b_acc, mask=m)
