# mypy: disallow-untyped-defs=False
# (the arguments of a kernel are pointers and scalars of Triton's own; only constexprs can be annotated)
"""The gradient at the raw products, from logits: of a tile's live columns, and of blocks of all columns."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

import triton
from fastguard.ops.launch import on_device
from fastguard.ops.lm_head_stats import portable
from fastguard.ops.lm_head_stats.op import Grads, Saved
from fastguard.ops.lm_head_stats.triton.pieces import FAR, logits
from fastguard.ops.vocabulary import Head


@triton.jit
def gradient(b_z, m_target, o_n, m_n, p_grads, p_saved, scale, softcap):
    """(d [R, C], kept [R], kept_mean [R]) of logits b_z [R, C]: the gradient at their raw products, and over the
    columns the sums of exp(z - rest_lse) off the target and, if a mean's gradient is given, of p (1 + z - mean_logit).

    Absent columns have logits FAR; absent rows give nothing. One exponential serves all: relative to lse where the
    target is and to rest_lse elsewhere, so at most 1; exp(rest_lse - lse) leads from one to the other. Rows lie along
    the first axis, of which a thread of a product holds few, and sums come before the gradient: little lives at a time.
    """
    b_lse = tl.load(p_saved.lse + o_n, mask=m_n, other=-FAR)
    b_rest_lse = tl.load(p_saved.rest_lse + o_n, mask=m_n, other=-FAR)
    b_share = tl.exp(b_rest_lse - b_lse)
    # Without a rest, rest_lse is -inf: FAR is still far below.
    b_e = tl.exp(b_z - tl.where(m_target, b_lse[:, None], tl.maximum(b_rest_lse, 0.1 * FAR)[:, None]))
    b_kept = tl.sum(tl.where(m_target, 0.0, b_e), 1)
    b_kept_mean = b_kept
    b_at = tl.zeros_like(b_lse)
    if p_grads.lse is not None:
        b_at += tl.load(p_grads.lse + o_n, mask=m_n, other=0.0)
    b_off = b_at * b_share
    if p_grads.rest_lse is not None:
        b_off += tl.load(p_grads.rest_lse + o_n, mask=m_n, other=0.0)
    if p_grads.mean_logit is not None:
        b_slope = b_z + (1.0 - tl.load(p_saved.mean_logit + o_n, mask=m_n, other=0.0))[:, None]
        b_kept_mean = tl.sum(b_e * tl.where(m_target, 1.0, b_share[:, None]) * b_slope, 1)
        b_mean = tl.load(p_grads.mean_logit + o_n, mask=m_n, other=0.0)
        b_d = b_e * tl.where(
            m_target, b_at[:, None] + b_mean[:, None] * b_slope, b_off[:, None] + (b_mean * b_share)[:, None] * b_slope
        )
    else:
        b_d = b_e * tl.where(m_target, b_at[:, None], b_off[:, None])
    if p_grads.target_logit is not None:
        b_d += tl.where(m_target, tl.load(p_grads.target_logit + o_n, mask=m_n, other=0.0)[:, None], 0.0)
    if softcap is not None:
        b_y = b_z / softcap
        b_d *= 1.0 - b_y * b_y
    return b_d * scale, b_kept, b_kept_mean


@triton.jit
def gradient_kernel(
    p_grads, p_z, p_bias, p_target, p_saved, p_out, N, V, stride_z, stride_out, scale, softcap,
    ROWS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """out [N, V] = the gradient at raw products z [N, V] of a block of V columns; target: counted from its first."""
    o_n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    m_n, m_v = o_n < N, o_v < V
    m = m_n[:, None] & m_v[None, :]
    b_z = tl.load(p_z + o_n.to(tl.int64)[:, None] * stride_z + o_v[None, :], mask=m, other=0.0).to(tl.float32)
    b_bias = tl.load(p_bias + o_v, mask=m_v, other=0.0).to(tl.float32)[None, :] if p_bias is not None else 0.0
    b_z = logits(b_z, b_bias, scale, softcap)
    m_target = o_v[None, :] == tl.load(p_target + o_n, mask=m_n, other=-1)[:, None]
    b_d, _, _ = gradient(b_z, m_target, o_n, m_n, p_grads, p_saved, scale, softcap)
    p_d = p_out + o_n.to(tl.int64)[:, None] * stride_out + o_v[None, :]
    tl.store(p_d, b_d.to(p_out.dtype.element_ty), mask=m)


class Kernels(portable.TorchKernels):
    """The element-wise work on blocks of all columns, `exact.Kernels`: gradients in one pass over them."""

    @on_device
    def gradient(  # type: ignore[override]
        self, z: Tensor, head: Head, index: Tensor | None, target: Tensor, row: Saved, grads: Grads, out: Tensor
    ) -> None:
        """See `exact.Kernels.gradient`."""
        if z.dtype == torch.float64:
            super().gradient(z, head, index, target, row, grads, out)
        elif z.numel():
            (n, v), blocks = z.shape, (8, 512)
            gradient_kernel[triton.cdiv(n, blocks[0]), triton.cdiv(v, blocks[1])](
                grads, z, head.bias, target, row, out, n, v, z.stride(0), out.stride(0), head.scale, head.softcap,
                ROWS=blocks[0], BLOCK_V=blocks[1],
            )  # fmt: skip
