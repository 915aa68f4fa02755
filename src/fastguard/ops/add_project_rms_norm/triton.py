# mypy: disallow-untyped-defs=False
# (the arguments of a kernel are pointers and scalars of Triton's own; only constexprs can be annotated)
"""``add_project_rms_norm`` on GPUs, in Triton; float64 and rows too wide for registers are handed to ``portable.py``.

A program holds ROWS whole rows in registers from the residual to the norm. More than ``FEW`` directions go through
``project_out``'s tile kernel, which norms at its end; in the backward they take a pass of their own.

Prefixes: p_ pointer, o_ offsets, m_ mask, b_ block of values. Shapes: N rows, D features, K directions.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

import triton
from fastguard.ops.add_project_rms_norm import portable
from fastguard.ops.launch import on_device, processors
from fastguard.ops.project_out import triton as projection
from fastguard.ops.project_out.triton import basis_of, scaled, sum_of_two, weight_of, without

MAX_WIDTH = 16384
"""Features of a row that a program's registers hold in the forward."""

MAX_GRADIENT_WIDTH = 8192
"""The same in the backward."""

WAVES = 2
"""Programs of the backward for each multiprocessor; each sums the weight's gradient over its rows."""


@triton.jit
def norm_kernel(
    p_residual, p_update, p_basis, p_index, p_weight, p_bias, p_stream, p_normed, N, D, K, each, scale, eps,
    stride_residual, stride_update,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, HAS_BASIS: tl.constexpr, HAS_INDEX: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """See ``portable.forward``."""
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, BLOCK)
    m_row = o_row < N
    m_d = o_d < D
    m = m_row[:, None] & m_d[None, :]
    o_long = o_row.to(tl.int64)[:, None]
    o_x = o_long * stride_residual + o_d[None, :]
    b_h = sum_of_two(p_residual, p_update, o_x, o_long * stride_update + o_d[None, :], m, True)
    if HAS_BASIS:
        b_own = basis_of(p_index, o_row, m_row, each, HAS_INDEX)
        b_h = without(b_h, p_basis, b_own, o_d, m_d, K, D, scale, HAS_INDEX)
    b_stored = b_h.to(p_stream.dtype.element_ty)
    o_out = o_long * D + o_d[None, :]
    tl.store(p_stream + o_out, b_stored, mask=m)
    b_h = b_stored.to(tl.float32)
    b_mean, b_inverse = moments(b_h, m, D, eps, NORM)
    b_y = scaled(b_h, b_mean, b_inverse, p_weight, p_bias, o_d, m_d, NORM)
    tl.store(p_normed + o_out, b_y.to(p_normed.dtype.element_ty), mask=m)


@triton.jit
def moments(b_h, m, D, eps, NORM: tl.constexpr):
    """Mean (0 but for a layer norm) and inverse deviation of rows b_h [ROWS, BLOCK]."""
    if NORM == 2:
        b_mean = tl.sum(b_h, 1) / D
        b_centred = tl.where(m, b_h - b_mean[:, None], 0.0)
        b_squares = tl.sum(b_centred * b_centred, 1)
    else:
        b_squares = tl.sum(b_h * b_h, 1)
        b_mean = b_squares * 0.0
    return b_mean, 1.0 / tl.sqrt(b_squares / D + eps)


@triton.jit
def norm_gradient_kernel(
    p_grad_stream, p_grad_normed, p_stream, p_rows, p_basis, p_index, p_weight, p_dh, p_partial,
    N, D, K, each, scale, eps, stride_grad_stream, stride_grad_normed, stride_stream,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, HAS_BASIS: tl.constexpr, HAS_INDEX: tl.constexpr, NORM: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
):  # fmt: skip
    """dh [N, D] and, of each program's rows, the gradients of weight and bias, partial [programs, 2, D].

    See ``portable.backward``. rows: which rows of stream and dh the N gradients belong to, or None for all in order.
    """
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < D
    b_dw = tl.zeros([BLOCK], tl.float32)
    b_db = tl.zeros([BLOCK], tl.float32)
    for first in range(tl.program_id(0) * ROWS, N, tl.num_programs(0) * ROWS):
        o_row = first + tl.arange(0, ROWS)
        m_row = o_row < N
        m = m_row[:, None] & m_d[None, :]
        o_long = o_row.to(tl.int64)[:, None]
        b_g = tl.load(p_grad_normed + o_long * stride_grad_normed + o_d[None, :], mask=m, other=0.0).to(tl.float32)
        o_own = o_long if p_rows is None else tl.load(p_rows + o_row, mask=m_row, other=0)[:, None]
        b_u = tl.load(p_stream + o_own * stride_stream + o_d[None, :], mask=m, other=0.0).to(tl.float32)
        b_mean, b_inverse = moments(b_u, m, D, eps, NORM)
        b_u = tl.where(m, b_u - b_mean[:, None], 0.0) * b_inverse[:, None]
        if NEED_WEIGHT:
            b_dw += tl.sum(b_g * b_u, 0)
            b_db += tl.sum(b_g, 0)
        b_g *= weight_of(p_weight, o_d, m_d, NORM)[None, :]  # again for each row: registers are dearer
        b_u = b_g - b_u * (tl.sum(b_g * b_u, 1) / D)[:, None]
        if NORM == 2:
            b_u -= (tl.sum(b_g, 1) / D)[:, None]
        b_u = tl.where(m, b_u * b_inverse[:, None], 0.0)
        if p_grad_stream is not None:
            o_g = o_long * stride_grad_stream + o_d[None, :]
            b_u += tl.load(p_grad_stream + o_g, mask=m, other=0.0).to(tl.float32)
        if HAS_BASIS:
            b_own = basis_of(p_index, o_row, m_row, each, HAS_INDEX)
            b_u = without(b_u, p_basis, b_own, o_d, m_d, K, D, scale, HAS_INDEX)
        tl.store(p_dh + o_own * D + o_d[None, :], b_u.to(p_dh.dtype.element_ty), mask=m)
    if NEED_WEIGHT:
        p_own = p_partial + tl.program_id(0).to(tl.int64) * 2 * D + o_d
        tl.store(p_own, b_dw, mask=m_d)
        tl.store(p_own + D, b_db, mask=m_d)


def programs(x: Tensor, rows: int) -> int:
    """Programs of the backward, each with several blocks of rows."""
    return min(triton.cdiv(x.shape[0], rows), WAVES * processors(x.device))


@on_device
def forward(
    residual: Tensor,
    update: Tensor,
    basis: Tensor | None,
    index: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: float,
    kind: int,
    stream: Tensor,
    out: Tensor,
) -> None:
    """See ``portable.forward``."""
    n, width = residual.shape
    k = 0 if basis is None else basis.shape[1]
    if residual.dtype == torch.float64:
        portable.forward(residual, update, basis, index, weight, bias, eps, scale, kind, stream, out)
    elif basis is not None and index is None and (k > projection.FEW or width > MAX_WIDTH):
        projection.project_tile(residual, update, basis, scale, stream, (kind, weight, bias, eps, out))
    elif width > MAX_WIDTH:
        portable.forward(residual, update, basis, index, weight, bias, eps, scale, kind, stream, out)
    else:
        flags = projection.row_tile(width)
        norm_kernel[(triton.cdiv(n, flags["ROWS"]),)](
            residual, update, basis, index, weight, bias, stream, out, n, width, k,
            projection.each_of(index, n), scale, eps, residual.stride(0), update.stride(0),
            HAS_BASIS=basis is not None, HAS_INDEX=index is not None, NORM=kind, **flags,
        )  # fmt: skip


@on_device
def backward(
    grad_stream: Tensor | None,
    grad_normed: Tensor | None,
    stream: Tensor,
    basis: Tensor | None,
    index: Tensor | None,
    weight: Tensor | None,
    eps: float,
    scale: float,
    kind: int,
    need_weight: bool,
    dh: Tensor,
) -> tuple[Tensor, Tensor]:
    """See ``portable.backward``."""
    n, width = stream.shape
    if stream.dtype == torch.float64 or width > MAX_GRADIENT_WIDTH:
        return portable.backward(
            grad_stream, grad_normed, stream, basis, index, weight, eps, scale, kind, need_weight, dh
        )
    none = torch.zeros(2, width, dtype=torch.float32, device=stream.device)
    if grad_normed is None:
        assert grad_stream is not None
        if basis is None:
            dh.copy_(grad_stream)
        else:
            projection.forward(grad_stream, basis, index, scale, False, dh)
        return none[0], none[1]
    flags = projection.row_tile(width, per_warp=512)
    many = basis is not None and index is None and basis.shape[1] > projection.FEW
    to = torch.empty(n, width, dtype=torch.float32, device=dh.device) if many and dh.dtype != torch.float32 else dh
    count = programs(stream, flags["ROWS"])
    partial = torch.empty(count, 2, width, dtype=torch.float32, device=stream.device) if need_weight else None
    norm_gradient_kernel[(count,)](
        grad_stream, grad_normed, stream, None, basis, index, weight, to, partial, n, width,
        0 if basis is None else basis.shape[1], projection.each_of(index, n), scale, eps,
        0 if grad_stream is None else grad_stream.stride(0), grad_normed.stride(0), stream.stride(0),
        HAS_BASIS=basis is not None and not many, HAS_INDEX=index is not None, NORM=kind, NEED_WEIGHT=need_weight,
        **flags,
    )  # fmt: skip
    if many:
        assert basis is not None
        projection.project_tile(to, None, basis, scale, dh)
    sums = none if partial is None else partial.sum(0)
    return sums[0], sums[1]
