# mypy: disallow-untyped-defs=False
# (the arguments of a kernel are pointers and scalars of Triton's own; only constexprs can be annotated)
"""What several kernels are made of."""

from __future__ import annotations

import triton.language as tl

import triton
from fastguard.ops.lm_head_stats import live

NEGATIVE = tl.constexpr(-1.0e30)
FAR = tl.constexpr(-1.0e15)  # its square is finite
LIVE = tl.constexpr(live.LIVE)
OCTAVE = tl.constexpr(live.CODES_PER_OCTAVE)
THRESHOLDS = tl.constexpr(live.THRESHOLDS)


@triton.jit
def logits(b_z, b_bias, scale, softcap):
    """Softcap(scale * (z + bias)); tanh by its series near 0, where the exponential form would cancel."""
    b_z = (b_z + b_bias) * scale
    if softcap is not None:
        b_y = b_z / softcap
        b_e = tl.exp(-2.0 * tl.abs(b_y))
        b_far = tl.where(b_y < 0, -1.0, 1.0) * (1.0 - b_e) / (1.0 + b_e)
        b_q = b_y * b_y
        b_near = b_y * (1.0 + b_q * (-1.0 / 3 + b_q * (2.0 / 15 + b_q * (-17.0 / 315))))
        b_z = softcap * tl.where(tl.abs(b_y) < 0.25, b_near, b_far)
    return b_z


@triton.jit
def product(
    p_a, p_b, D, A_BLOCK: tl.constexpr, B_BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A @ B^T in fp32 of two blocks of rows with D features; p_a [A_BLOCK], p_b [B_BLOCK] point at row starts."""
    b_acc = tl.zeros([A_BLOCK, B_BLOCK], dtype=tl.float32)
    o_k = tl.arange(0, BLOCK_K)
    for k in range(0, D, BLOCK_K):
        if EVEN:
            b_a = tl.load(p_a[:, None] + (k + o_k)[None, :])
            b_b = tl.load(p_b[:, None] + (k + o_k)[None, :])
        else:
            m_k = (k + o_k)[None, :] < D
            b_a = tl.load(p_a[:, None] + (k + o_k)[None, :], mask=m_k, other=0.0)
            b_b = tl.load(p_b[:, None] + (k + o_k)[None, :], mask=m_k, other=0.0)
        b_acc = tl.dot(b_a, tl.trans(b_b), b_acc, input_precision=PRECISION)
    return b_acc
