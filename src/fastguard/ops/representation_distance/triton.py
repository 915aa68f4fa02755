# mypy: disallow-untyped-defs=False
# (the arguments of a kernel are pointers and scalars of Triton's own; only constexprs can be annotated)
"""``representation_distance`` on GPUs, in Triton; float64 and rows beyond ``MAX_WIDTH`` are handed to ``portable.py``.

A program holds ROWS whole rows of a and b in registers, so that a cosine, which needs the norms before the
differences, reads them once. Memory traffic bounds both kernels.

Prefixes: p_ pointer, o_ offsets, m_ mask, b_ block of values. Shapes: L layers, N rows, D features.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

import triton
from fastguard.ops.launch import on_device
from fastguard.ops.representation_distance import portable

MAX_WIDTH = 16384
"""Features that a program's registers hold of a row of a and of one of b."""

ELEMENTS = 4096
"""Elements of a tile of narrow rows."""


@triton.jit
def row_offsets(o_row, N, stride_layer, stride_row):
    """Where the rows o_row of the L N begin."""
    return (o_row // N).to(tl.int64) * stride_layer + (o_row % N).to(tl.int64) * stride_row


@triton.jit
def rows_of(
    p_a, p_b, p_mask, n_rows, N, D, stride_al, stride_an, stride_bl, stride_bn,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """The program's rows, which of them there are and count, and their features [ROWS, BLOCK] in fp32."""
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, BLOCK)
    m_row = o_row < n_rows
    m_keep = m_row
    if HAS_MASK:
        m_keep = m_row & (tl.load(p_mask + o_row % N, mask=m_row, other=0) != 0)
    m = m_keep[:, None] & (o_d < D)[None, :]
    o_a = row_offsets(o_row, N, stride_al, stride_an)
    o_b = row_offsets(o_row, N, stride_bl, stride_bn)
    b_x = tl.load(p_a + o_a[:, None] + o_d[None, :], mask=m, other=0.0).to(tl.float32)
    b_y = tl.load(p_b + o_b[:, None] + o_d[None, :], mask=m, other=0.0).to(tl.float32)
    return o_row, m_row, m_keep, b_x, b_y


@triton.jit
def distance_kernel(
    p_a, p_b, p_mask, p_distance, p_inverse, n_rows, N, D, stride_al, stride_an, stride_bl, stride_bn,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, COSINE: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """distance [L, N] and, for a cosine, the inverse norms [2, L, N]; see ``portable.forward``."""
    o_row, m_row, m_keep, b_x, b_y = rows_of(
        p_a, p_b, p_mask, n_rows, N, D, stride_al, stride_an, stride_bl, stride_bn, ROWS, BLOCK, HAS_MASK
    )
    if COSINE:
        b_xx, b_yy = tl.sum(b_x * b_x, 1), tl.sum(b_y * b_y, 1)
        m_dead = (b_xx == 0) | (b_yy == 0)
        b_p = tl.where(m_dead, 0.0, 1.0 / tl.sqrt(tl.where(m_dead, 1.0, b_xx)))
        b_q = tl.where(m_dead, 0.0, 1.0 / tl.sqrt(tl.where(m_dead, 1.0, b_yy)))
        b_d = b_p[:, None] * (b_x - b_y) + (b_p - b_q)[:, None] * b_y
        b_distance = tl.where(m_dead, 1.0, tl.sum(b_d * b_d, 1) * 0.5)
        tl.store(p_inverse + o_row, b_p, mask=m_row)
        tl.store(p_inverse + n_rows + o_row, b_q, mask=m_row)
    else:
        b_d = b_x - b_y
        b_distance = tl.sqrt(tl.sum(b_d * b_d, 1))
    tl.store(p_distance + o_row, tl.where(m_keep, b_distance, 0.0), mask=m_row)


@triton.jit
def gradient_kernel(
    p_grad, p_a, p_b, p_mask, p_distance, p_inverse, p_da, n_rows, N, D, stride_al, stride_an, stride_bl, stride_bn,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, COSINE: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """da [L, N, D], written once; see ``portable.backward``."""
    o_row, m_row, m_keep, b_x, b_y = rows_of(
        p_a, p_b, p_mask, n_rows, N, D, stride_al, stride_an, stride_bl, stride_bn, ROWS, BLOCK, HAS_MASK
    )
    b_g = tl.load(p_grad + o_row, mask=m_keep, other=0.0)
    b_distance = tl.load(p_distance + o_row, mask=m_keep, other=0.0)
    if COSINE:
        b_p = tl.load(p_inverse + o_row, mask=m_keep, other=0.0)
        b_q = tl.load(p_inverse + n_rows + o_row, mask=m_keep, other=0.0)
        b_d = b_p[:, None] * (b_x - b_y) + (b_p - b_q)[:, None] * b_y - (b_distance * b_p)[:, None] * b_x
        b_c = b_g * b_p
    else:
        b_d = b_x - b_y
        m_zero = b_distance == 0
        b_c = tl.where(m_zero, 0.0, b_g / tl.where(m_zero, 1.0, b_distance))
    o_d = tl.arange(0, BLOCK)
    m = m_row[:, None] & (o_d < D)[None, :]
    p_out = p_da + o_row.to(tl.int64)[:, None] * D + o_d[None, :]
    tl.store(p_out, (b_c[:, None] * b_d).to(p_da.dtype.element_ty), mask=m)


def _launch(a: Tensor, b: Tensor, mask: Tensor | None, cosine: bool) -> tuple[int, tuple[int, ...], dict[str, object]]:
    """Programs, scalar arguments, and flags of both kernels."""
    layers, n, width = a.shape
    block = triton.next_power_of_2(width)
    rows = max(1, ELEMENTS // block)
    strides = (a.stride(0), a.stride(1), b.stride(0), b.stride(1))
    flags = {
        "ROWS": rows, "BLOCK": block, "COSINE": cosine, "HAS_MASK": mask is not None,
        "num_warps": warps(rows * block),
    }  # fmt: skip
    return triton.cdiv(layers * n, rows), (layers * n, n, width, *strides), flags


def warps(elements: int) -> int:
    """Warps of a program whose tiles have so many elements: 32 of each tile to a thread."""
    return max(1, min(16, elements // 1024))


def _elsewhere(a: Tensor) -> bool:
    return a.dtype == torch.float64 or a.shape[-1] > MAX_WIDTH or a.numel() == 0


@on_device
def forward(a: Tensor, b: Tensor, mask: Tensor | None, cosine: bool) -> tuple[Tensor, Tensor]:
    """See ``portable.forward``."""
    if _elsewhere(a):
        return portable.forward(a, b, mask, cosine)
    layers, n, _ = a.shape
    distance = torch.empty(layers, n, dtype=torch.float32, device=a.device)
    inverse = torch.empty(2 if cosine else 0, layers, n, dtype=torch.float32, device=a.device)
    programs, sizes, flags = _launch(a, b, mask, cosine)
    keep = None if mask is None else mask.view(torch.uint8)
    distance_kernel[(programs,)](a, b, keep, distance, inverse, *sizes, **flags)
    return distance, inverse


@on_device
def backward(
    grad: Tensor, a: Tensor, b: Tensor, mask: Tensor | None, distance: Tensor, inverse: Tensor, cosine: bool
) -> Tensor:
    """See ``portable.backward``."""
    if _elsewhere(a):
        return portable.backward(grad, a, b, mask, distance, inverse, cosine)
    da = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    programs, sizes, flags = _launch(a, b, mask, cosine)
    keep = None if mask is None else mask.view(torch.uint8)
    gradient_kernel[(programs,)](grad, a, b, keep, distance, inverse, da, *sizes, **flags)
    return da
