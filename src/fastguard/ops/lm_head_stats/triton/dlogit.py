# mypy: disallow-untyped-defs=False
# (the arguments of a kernel are pointers and scalars of Triton's own; only constexprs can be annotated)
"""The gradient at the raw products of the live columns."""

from __future__ import annotations

import triton.language as tl

import triton
from fastguard.ops.lm_head_stats.triton.pieces import FAR, logits, product


@triton.jit
def dlogit_kernel(
    p_grads, p_x, p_weight, p_bias, p_target, p_saved, p_index, p_count, p_dlogit, p_kept, p_kept_mean,
    N, D, n_places, stride_index, scale, softcap,
    TILE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient at the raw products of the listed columns of one tile: dlogit [T, n_places, TILE].

    grads: `Grads`; saved: `Saved`. kept, kept_mean [blocks, N]: per block of places, each row's sum of
    exp(z - rest_lse) over v != target and of p (1 + z - mean_logit).
    """
    i_tile, i_block = tl.program_id(0), tl.program_id(1)
    n_listed = tl.load(p_count + i_tile)
    if i_block * BLOCK_C >= n_listed:
        return
    o_c = i_block * BLOCK_C + tl.arange(0, BLOCK_C)
    o_n = i_tile * TILE + tl.arange(0, TILE)
    m_n = o_n < N
    b_index = tl.load(p_index + i_tile.to(tl.int64) * stride_index + o_c, mask=o_c < n_listed, other=-1)
    b_column = tl.maximum(b_index, 0)
    p_listed = p_weight + b_column.to(tl.int64) * D
    p_rows = p_x + tl.minimum(o_n, N - 1).to(tl.int64) * D
    b_z = product(p_listed, p_rows, D, BLOCK_C, TILE, BLOCK_K, EVEN, PRECISION)
    b_bias = tl.load(p_bias + b_column).to(tl.float32)[:, None] if p_bias is not None else 0.0
    # Places beyond the list and rows beyond the last have no mass and no target.
    b_z = tl.where(b_index[:, None] >= 0, logits(b_z, b_bias, scale, softcap), FAR)
    m_target = b_index[:, None] == tl.load(p_target + o_n, mask=m_n, other=-2).to(tl.int32)[None, :]
    b_d = tl.zeros([BLOCK_C, TILE], dtype=tl.float32)
    if p_grads.lse is not None or p_grads.mean_logit is not None:
        b_p = tl.exp(b_z - tl.load(p_saved.lse + o_n, mask=m_n, other=float("inf"))[None, :])
    if p_grads.lse is not None:
        b_d += b_p * tl.load(p_grads.lse + o_n, mask=m_n, other=0.0)[None, :]
    if p_grads.mean_logit is not None:
        b_m = b_p * (1.0 + b_z - tl.load(p_saved.mean_logit + o_n, mask=m_n, other=0.0)[None, :])
        b_d += b_m * tl.load(p_grads.mean_logit + o_n, mask=m_n, other=0.0)[None, :]
        if p_kept_mean is not None:
            tl.store(p_kept_mean + i_block.to(tl.int64) * N + o_n, tl.sum(b_m, 0), mask=m_n)
    if p_grads.rest_lse is not None or p_kept is not None:
        b_rest = tl.exp(b_z - tl.load(p_saved.rest_lse + o_n, mask=m_n, other=float("inf"))[None, :])
        b_rest = tl.where(m_target, 0.0, b_rest)
        if p_kept is not None:
            tl.store(p_kept + i_block.to(tl.int64) * N + o_n, tl.sum(b_rest, 0), mask=m_n)
    if p_grads.rest_lse is not None:
        b_d += b_rest * tl.load(p_grads.rest_lse + o_n, mask=m_n, other=0.0)[None, :]
    if p_grads.target_logit is not None:
        b_d += tl.where(m_target, tl.load(p_grads.target_logit + o_n, mask=m_n, other=0.0)[None, :], 0.0)
    if softcap is not None:
        b_y = b_z / softcap
        b_d *= 1.0 - b_y * b_y
    b_d *= scale
    p_out = p_dlogit + (i_tile.to(tl.int64) * n_places + i_block * BLOCK_C) * TILE
    o_out = tl.arange(0, BLOCK_C)[:, None] * TILE + tl.arange(0, TILE)[None, :]
    tl.store(p_out + o_out, b_d.to(p_dlogit.dtype.element_ty))
