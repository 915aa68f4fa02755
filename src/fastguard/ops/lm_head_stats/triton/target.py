# mypy: disallow-untyped-defs=False
# (the arguments of a kernel are pointers and scalars of Triton's own; only constexprs can be annotated)
"""The target logit of each row."""

from __future__ import annotations

import triton.language as tl

import triton
from fastguard.ops.lm_head_stats.triton.pieces import logits


@triton.jit
def target_kernel(
    p_x, p_weight, p_bias, p_target, p_out, N, D, scale, softcap, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Target logit of each row: out [N]."""
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    b_target = tl.load(p_target + o_n, mask=m_n, other=0)
    o_k = tl.arange(0, BLOCK_K)
    b_z = tl.zeros([BLOCK_N], dtype=tl.float32)
    for k in range(0, D, BLOCK_K):
        m = m_n[:, None] & ((k + o_k)[None, :] < D)
        b_x = tl.load(p_x + o_n.to(tl.int64)[:, None] * D + (k + o_k)[None, :], mask=m, other=0.0)
        b_w = tl.load(p_weight + b_target[:, None] * D + (k + o_k)[None, :], mask=m, other=0.0)
        b_z += tl.sum(b_x.to(tl.float32) * b_w.to(tl.float32), 1)
    b_bias = tl.load(p_bias + b_target, mask=m_n, other=0.0).to(tl.float32) if p_bias is not None else 0.0
    tl.store(p_out + o_n, logits(b_z, b_bias, scale, softcap), mask=m_n)
