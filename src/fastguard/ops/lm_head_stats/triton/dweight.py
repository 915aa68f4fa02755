# mypy: disallow-untyped-defs=False
# (the arguments of a kernel are pointers and scalars of Triton's own; only constexprs can be annotated)
"""The gradients of the head's weight and bias."""

from __future__ import annotations

import triton.language as tl

import triton


@triton.jit
def dweight_kernel(
    p_dlogit, p_x, p_column, p_place, p_most, p_tile, p_n_tiles, p_shrink, p_dweight, p_dbias,
    N, V, D, n_places, n_tiles, first,
    TILE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dweight[column] += dlogit @ x * shrink and dbias[column] += dlogit summed over rows, by blocks of columns.

    column [V]: the columns of W in the order of the blocks; place [T, V]: where each stands in the list of a tile, -1
    for nowhere, of which dlogit has those from the ``first`` on; tile [blocks, T], n_tiles [blocks]: the tiles in which
    a block has anything there; most: the longest list. The programs of a part of D take the blocks in turns.
    """
    if tl.load(p_most) <= first:
        return
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    o_t = tl.arange(0, BLOCK_N)
    b_shrink = tl.load(p_shrink) if p_shrink is not None else 1.0  # a power of two
    for i_block in range(tl.program_id(0), tl.cdiv(V, COLUMNS), tl.num_programs(0)):
        n_steps = tl.load(p_n_tiles + i_block) * (TILE // BLOCK_N)
        if n_steps > 0:
            o_c = i_block * COLUMNS + tl.arange(0, COLUMNS)
            m_c = o_c < V
            b_column = tl.load(p_column + o_c, mask=m_c, other=0).to(tl.int64)
            if p_dweight is not None:
                m = m_c[:, None] & m_d[None, :]
                p_out = p_dweight + b_column[:, None] * D + o_d[None, :]
                b_acc = tl.load(p_out, mask=m, other=0.0) / b_shrink
            b_sum = tl.zeros([COLUMNS], dtype=tl.float32)
            for i_step in range(n_steps):
                i_tile = tl.load(p_tile + i_block * n_tiles + i_step // (TILE // BLOCK_N)).to(tl.int64)
                o_row = (i_step % (TILE // BLOCK_N)) * BLOCK_N + o_t
                b_slot = tl.load(p_place + i_tile * V + b_column, mask=m_c, other=-1) - first
                m_slot = (b_slot >= 0) & (b_slot < n_places)
                p_lists = p_dlogit + i_tile * n_places * TILE
                b_d = tl.load(p_lists + b_slot[:, None] * TILE + o_row[None, :], mask=m_slot[:, None], other=0.0)
                if p_dbias is not None:
                    b_sum += tl.sum(b_d.to(tl.float32), 1)
                if p_dweight is not None:
                    o_x = tl.minimum(i_tile * TILE + o_row, N - 1)  # dlogit is 0 beyond the last row
                    b_x = tl.load(p_x + o_x[:, None] * D + o_d[None, :], mask=m_d[None, :], other=0.0)
                    b_acc = tl.dot(b_d, b_x, b_acc, input_precision=PRECISION)
            if p_dweight is not None:
                tl.store(p_out, b_acc * b_shrink, mask=m)
            if p_dbias is not None and tl.program_id(1) == 0:
                tl.store(p_dbias + b_column, tl.load(p_dbias + b_column, mask=m_c) + b_sum * b_shrink, mask=m_c)
