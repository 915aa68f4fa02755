# mypy: disallow-untyped-defs=False
# (the arguments of a kernel are pointers and scalars of Triton's own; only constexprs can be annotated)
"""The gradient at the raw products of the live columns."""

from __future__ import annotations

import triton.language as tl

import triton
from fastguard.ops.lm_head_stats.triton.gradient import gradient
from fastguard.ops.lm_head_stats.triton.pieces import FAR, logits, product


@triton.jit
def dlogit_kernel(
    p_grads, p_x, p_weight, p_bias, p_target, p_saved, p_index, p_count, p_dlogit, p_kept, p_kept_mean,
    N, D, n_places, stride_index, first, scale, softcap,
    TILE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient at the raw products of one tile's listed columns from the ``first`` on: dlogit [T, n_places, TILE].

    grads: `Grads`; saved: `Saved`. kept, kept_mean [programs of a tile, N]: grow by each row's sums of
    exp(z - rest_lse) over v != target and of p (1 + z - mean_logit). The programs of a tile take its blocks in turns.
    """
    i_tile, i_program = tl.program_id(0), tl.program_id(1)
    n_listed = tl.minimum(tl.load(p_count + i_tile) - first, n_places)
    if i_program * BLOCK_C >= n_listed:
        return
    o_r = tl.arange(0, TILE)
    o_n = i_tile * TILE + o_r
    m_n = o_n < N
    p_rows = p_x + tl.minimum(o_n, N - 1).to(tl.int64) * D
    p_list = p_index + i_tile.to(tl.int64) * stride_index + first
    b_target = tl.load(p_target + o_n, mask=m_n, other=-2).to(tl.int32)
    b_kept = tl.zeros([TILE], dtype=tl.float32)
    b_kept_mean = tl.zeros([TILE], dtype=tl.float32)
    for i_block in range(i_program, tl.cdiv(n_listed, BLOCK_C), tl.num_programs(1)):
        o_c = i_block * BLOCK_C + tl.arange(0, BLOCK_C)
        b_index = tl.load(p_list + o_c, mask=o_c < n_listed, other=-1)
        p_listed = p_weight + tl.maximum(b_index, 0).to(tl.int64) * D
        b_z = product(p_rows, p_listed, D, TILE, BLOCK_C, BLOCK_K, EVEN, PRECISION)
        # A half at a time: with a bias, a soft-cap and a mean there are not the registers for what becomes of all.
        b_left, b_right = tl.split(tl.trans(tl.reshape(b_z, [TILE, 2, BLOCK_C // 2]), 0, 2, 1))
        for i_half in tl.static_range(2):
            o_c = i_block * BLOCK_C + i_half * (BLOCK_C // 2) + tl.arange(0, BLOCK_C // 2)
            b_index = tl.load(p_list + o_c, mask=o_c < n_listed, other=-1)
            b_bias = 0.0
            if p_bias is not None:
                b_bias = tl.load(p_bias + tl.maximum(b_index, 0)).to(tl.float32)[None, :]
            # Places beyond the list have no mass and no target.
            b_z = logits(b_left if i_half == 0 else b_right, b_bias, scale, softcap)
            b_z = tl.where(b_index[None, :] >= 0, b_z, FAR)
            m_target = b_index[None, :] == b_target[:, None]
            b_d, b_rest, b_mean = gradient(b_z, m_target, o_n, m_n, p_grads, p_saved, scale, softcap)
            b_kept += b_rest
            if p_kept_mean is not None:
                b_kept_mean += b_mean
            p_out = p_dlogit + i_tile.to(tl.int64) * n_places * TILE
            tl.store(p_out + o_c[None, :] * TILE + o_r[:, None], b_d.to(p_dlogit.dtype.element_ty))
    o_kept = i_program.to(tl.int64) * N + o_n
    tl.store(p_kept + o_kept, tl.load(p_kept + o_kept, mask=m_n) + b_kept, mask=m_n)
    if p_kept_mean is not None:
        tl.store(p_kept_mean + o_kept, tl.load(p_kept_mean + o_kept, mask=m_n) + b_kept_mean, mask=m_n)
