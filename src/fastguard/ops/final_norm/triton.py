# mypy: disallow-untyped-defs=False
# (the arguments of a kernel are pointers and scalars of Triton's own; only constexprs can be annotated)
"""``final_norm`` on GPUs, in Triton; float64 and rows too wide for registers are handed to ``portable.py``.

A program holds ROWS whole rows in registers, read from where they lie in the source and rounded for the product with
the head. The gradient is ``add_project_rms_norm``'s kernel, told which rows to read and write.

Prefixes: p_ pointer, o_ offsets, m_ mask, b_ block of values. Shapes: M rows of the source, N gathered rows, D
features.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

import triton
from fastguard.ops.add_project_rms_norm.portable import LAYER, RMS, RMS_OFFSET
from fastguard.ops.add_project_rms_norm.triton import (
    MAX_GRADIENT_WIDTH,
    MAX_WIDTH,
    moments,
    norm_gradient_kernel,
    programs,
)
from fastguard.ops.final_norm import portable
from fastguard.ops.launch import on_device
from fastguard.ops.project_out.triton import row_tile, scaled
from fastguard.ops.vocabulary import Norm

NUMBERS = {"rms": RMS, "rms_offset": RMS_OFFSET, "layer": LAYER}


@triton.jit
def gather_norm_kernel(
    p_x, p_rows, p_weight, p_bias, p_out, N, D, eps, stride_x,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """See ``portable.forward``."""
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, BLOCK)
    m_row = o_row < N
    m_d = o_d < D
    m = m_row[:, None] & m_d[None, :]
    o_from = o_row.to(tl.int64) if p_rows is None else tl.load(p_rows + o_row, mask=m_row, other=0)
    b_x = tl.load(p_x + o_from[:, None] * stride_x + o_d[None, :], mask=m, other=0.0).to(tl.float32)
    b_mean, b_inverse = moments(b_x, m, D, eps, NORM)
    own = p_x.dtype.element_ty
    if NORM == 0:  # Llama's rounds before it scales
        b_y = (b_x * b_inverse[:, None]).to(own).to(tl.float32)
        if p_weight is not None:
            b_y *= tl.load(p_weight + o_d, mask=m_d, other=0.0).to(own).to(tl.float32)[None, :]
    else:
        b_y = scaled(b_x, b_mean, b_inverse, p_weight, p_bias, o_d, m_d, NORM)
    p_to = p_out + o_row.to(tl.int64)[:, None] * D + o_d[None, :]
    tl.store(p_to, b_y.to(own).to(p_out.dtype.element_ty), mask=m)


@on_device
def forward(source: Tensor, rows: Tensor | None, norm: Norm, dtype: torch.dtype) -> Tensor:
    """See ``portable.forward``."""
    width = source.shape[1]
    if norm.kind == "none" or source.dtype == torch.float64 or width > MAX_WIDTH or source.stride(1) != 1:
        return portable.forward(source, rows, norm, dtype)
    n = source.shape[0] if rows is None else rows.shape[0]
    out = torch.empty(n, width, dtype=dtype, device=source.device)
    if n:
        flags = row_tile(width)
        gather_norm_kernel[(triton.cdiv(n, flags["ROWS"]),)](
            source, rows, norm.weight, norm.bias, out, n, width, norm.eps, source.stride(0),
            NORM=NUMBERS[norm.kind], **flags,
        )  # fmt: skip
    return out


@on_device
def backward(
    grad: Tensor, source: Tensor, rows: Tensor | None, norm: Norm
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See ``portable.backward``."""
    n, width = grad.shape
    if (
        norm.kind == "none" or source.dtype == torch.float64 or width > MAX_GRADIENT_WIDTH or source.stride(1) != 1
        or not n
    ):  # fmt: skip
        return portable.backward(grad, source, rows, norm)
    dx = torch.empty(source.shape, dtype=source.dtype, device=source.device)
    if rows is not None:
        dx.zero_()
    flags = row_tile(width, per_warp=512)
    count = programs(grad, flags["ROWS"])
    need_weight = norm.weight is not None or norm.bias is not None
    partial = torch.empty(count, 2, width, dtype=torch.float32, device=source.device) if need_weight else None
    norm_gradient_kernel[(count,)](
        None, grad, source, rows, None, None, norm.weight, dx, partial, n, width, 0, 1, 0.0, norm.eps,
        0, grad.stride(0), source.stride(0), HAS_BASIS=False, HAS_INDEX=False, NORM=NUMBERS[norm.kind],
        NEED_WEIGHT=need_weight, **flags,
    )  # fmt: skip
    dweight, dbias = (None, None) if partial is None else partial.sum(0).unbind()
    return dx, None if norm.weight is None else dweight, None if norm.bias is None else dbias
