# mypy: disallow-untyped-defs=False
# (the arguments of a kernel are pointers and scalars of Triton's own; only constexprs can be annotated)
"""The gradients of the head's weight and bias."""

from __future__ import annotations

import triton.language as tl

import triton


@triton.jit
def dweight_kernel(
    p_dlogit, p_x, p_column, p_slot, p_tile, p_n_tiles, p_dweight, p_dbias, N, D, n_places, n_columns, n_tiles,
    stride_slot, stride_tile,
    TILE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dweight[column] += dlogit @ x and dbias[column] += dlogit summed over rows, for a block of columns.

    column [n_columns]: the columns of W in the order of the blocks; slot [T, n_columns]: where each stands in the
    list of a tile, -1 for nowhere; tile [blocks, T], n_tiles [blocks]: the tiles in which a block has anything.
    """
    i_block, i_d = tl.program_id(0), tl.program_id(1)
    n_steps = tl.load(p_n_tiles + i_block) * (TILE // BLOCK_N)
    if n_steps == 0:
        return
    o_c = i_block * COLUMNS + tl.arange(0, COLUMNS)
    m_c = o_c < n_columns
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    o_t = tl.arange(0, BLOCK_N)
    b_column = tl.load(p_column + o_c, mask=m_c, other=0).to(tl.int64)
    if p_dweight is not None:
        m = m_c[:, None] & m_d[None, :]
        p_out = p_dweight + b_column[:, None] * D + o_d[None, :]
        b_acc = tl.load(p_out, mask=m, other=0.0)
    b_sum = tl.zeros([COLUMNS], dtype=tl.float32)
    for i_step in range(n_steps):
        i_tile = tl.load(p_tile + i_block.to(tl.int64) * stride_tile + i_step // (TILE // BLOCK_N))
        o_row = (i_step % (TILE // BLOCK_N)) * BLOCK_N + o_t
        b_slot = tl.load(p_slot + i_tile.to(tl.int64) * stride_slot + o_c, mask=m_c, other=-1)
        p_lists = p_dlogit + i_tile.to(tl.int64) * n_places * TILE
        b_d = tl.load(p_lists + b_slot[:, None] * TILE + o_row[None, :], mask=(b_slot >= 0)[:, None], other=0.0)
        if p_dbias is not None:
            b_sum += tl.sum(b_d.to(tl.float32), 1)
        if p_dweight is not None:
            o_x = tl.minimum(o_row, N - 1 - i_tile * TILE)  # dlogit is 0 beyond the last row
            p_rows = p_x + i_tile.to(tl.int64) * TILE * D
            b_x = tl.load(p_rows + o_x[:, None] * D + o_d[None, :], mask=m_d[None, :], other=0.0)
            b_acc = tl.dot(b_d, b_x, b_acc, input_precision=PRECISION)
    if p_dweight is not None:
        tl.store(p_out, b_acc, mask=m)
    if p_dbias is not None and i_d == 0:
        tl.store(p_dbias + b_column, tl.load(p_dbias + b_column, mask=m_c, other=0.0) + b_sum, mask=m_c)
