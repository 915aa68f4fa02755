# mypy: disallow-untyped-defs=False
# (the arguments of a kernel are pointers and scalars of Triton's own; only constexprs can be annotated)
"""``project_out`` on GPUs, in Triton; float64 and rows too wide for registers are handed to ``portable.py``.

Up to ``FEW`` directions, or one basis for each row: a program holds ROWS whole rows in registers and takes the
directions one by one, each product from the row as it came. More directions: a program takes ROWS rows through matrix
products in fp32, CHUNK features at a time, twice; the second time they come out of L2. Memory sees one read and one
write either way.

Prefixes: p_ pointer, o_ offsets, m_ mask, b_ block of values. Shapes: N rows, D features, K directions.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

import triton
from fastguard.ops.launch import on_device
from fastguard.ops.project_out import portable

MAX_WIDTH = 16384
"""Features of a row that a program's registers hold, with what is left of it and a direction."""

MAX_GRADIENT_WIDTH = 8192
"""The same with a row of the gradient."""

ELEMENTS = 4096
"""Elements of a tile of narrow rows."""

FEW = 15
"""Most directions that are taken one by one."""

TILE = {"ROWS": 16, "CHUNK": 64}
"""The matrix products' tile, beside its directions."""


@triton.jit
def basis_of(p_index, o_row, m_row, each, HAS_INDEX: tl.constexpr):
    """The basis of each row; -1 for none."""
    if HAS_INDEX:
        b_own = tl.load(p_index + o_row // each, mask=m_row, other=-1)
    else:
        b_own = o_row.to(tl.int64) * 0
    return b_own


@triton.jit
def without(b_x, p_basis, b_own, o_d, m_d, K, D, scale, HAS_INDEX: tl.constexpr):
    """Rows b_x [ROWS, BLOCK] without their part in their basis."""
    b_y = b_x
    for k in range(K):
        if HAS_INDEX:
            m = (b_own >= 0)[:, None] & m_d[None, :]
            b_q = tl.load(p_basis + ((b_own * K + k) * D)[:, None] + o_d[None, :], mask=m, other=0.0)
        else:
            b_q = tl.load(p_basis + k * D + o_d, mask=m_d, other=0.0)[None, :]
        b_y -= (scale * tl.sum(b_x * b_q, 1))[:, None] * b_q
    return b_y


@triton.jit
def project_kernel(
    p_x, p_basis, p_index, p_out, N, D, K, each, scale, stride_x, stride_out,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, HAS_INDEX: tl.constexpr, PRESERVE: tl.constexpr,
):  # fmt: skip
    """See ``portable.forward``."""
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, BLOCK)
    m_row = o_row < N
    m_d = o_d < D
    m = m_row[:, None] & m_d[None, :]
    b_own = basis_of(p_index, o_row, m_row, each, HAS_INDEX)
    b_x = tl.load(p_x + o_row.to(tl.int64)[:, None] * stride_x + o_d[None, :], mask=m, other=0.0).to(tl.float32)
    b_y = without(b_x, p_basis, b_own, o_d, m_d, K, D, scale, HAS_INDEX)
    if PRESERVE:
        b_left = tl.sqrt(tl.sum(b_y * b_y, 1))
        b_length = tl.sqrt(tl.sum(b_x * b_x, 1))
        b_by = tl.where(b_left == 0, 0.0, b_length / tl.where(b_left == 0, 1.0, b_left))
        b_y *= tl.where(b_own < 0, 1.0, b_by)[:, None]
    p_to = p_out + o_row.to(tl.int64)[:, None] * stride_out + o_d[None, :]
    tl.store(p_to, b_y.to(p_out.dtype.element_ty), mask=m)


@triton.jit
def project_gradient_kernel(
    p_grad, p_x, p_basis, p_index, p_dx, N, D, K, each, scale, stride_grad, stride_x, stride_dx,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, HAS_INDEX: tl.constexpr,
):  # fmt: skip
    """The norm-preserving form's; see ``portable.backward``."""
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, BLOCK)
    m_row = o_row < N
    m_d = o_d < D
    m = m_row[:, None] & m_d[None, :]
    b_own = basis_of(p_index, o_row, m_row, each, HAS_INDEX)
    o_long = o_row.to(tl.int64)[:, None]
    b_x = tl.load(p_x + o_long * stride_x + o_d[None, :], mask=m, other=0.0).to(tl.float32)
    b_g = tl.load(p_grad + o_long * stride_grad + o_d[None, :], mask=m, other=0.0).to(tl.float32)
    b_z = without(b_x, p_basis, b_own, o_d, m_d, K, D, scale, HAS_INDEX)
    b_left = tl.sqrt(tl.sum(b_z * b_z, 1))
    b_length = tl.sqrt(tl.sum(b_x * b_x, 1))
    b_inverse = tl.where(b_left == 0, 0.0, 1.0 / tl.where(b_left == 0, 1.0, b_left))
    b_along = tl.sum(b_z * b_g, 1) * b_inverse
    m_none = b_own < 0
    b_by = tl.where(m_none, 1.0, b_length * b_inverse)
    b_back = tl.where(m_none, 0.0, b_along * b_inverse)
    b_z = b_by[:, None] * (b_g - b_back[:, None] * b_z)
    b_z = without(b_z, p_basis, b_own, o_d, m_d, K, D, scale, HAS_INDEX)
    m_through = m_none | (b_length == 0)
    b_z += tl.where(m_through, 0.0, b_along / tl.where(m_through, 1.0, b_length))[:, None] * b_x
    tl.store(p_dx + o_long * stride_dx + o_d[None, :], b_z.to(p_dx.dtype.element_ty), mask=m)


@triton.jit
def sum_of_two(p_x, p_update, o_x, o_update, m, HAS_UPDATE: tl.constexpr):
    """What lies at p_x + o_x, and where there is one the update, in fp32."""
    b_x = tl.load(p_x + o_x, mask=m, other=0.0).to(tl.float32)
    if HAS_UPDATE:
        b_x += tl.load(p_update + o_update, mask=m, other=0.0).to(tl.float32)
    return b_x


@triton.jit
def project_tile_kernel(
    p_x, p_update, p_basis, p_weight, p_bias, p_out, p_normed, N, D, K, scale, eps, stride_x, stride_update, stride_out,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, DIRECTIONS: tl.constexpr, HAS_UPDATE: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Many directions, one basis. NORM: None, or a norm of what was stored, of the kinds of add_project_rms_norm."""
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_k = tl.arange(0, DIRECTIONS)
    m_row = o_row < N
    m_k = o_k < K
    o_x = o_row.to(tl.int64)[:, None] * stride_x
    o_update = o_row.to(tl.int64)[:, None] * stride_update
    o_out = o_row.to(tl.int64)[:, None] * stride_out
    b_c = tl.zeros([ROWS, DIRECTIONS], tl.float32)
    for first in range(0, D, CHUNK):
        o_d = first + tl.arange(0, CHUNK)
        m_d = o_d < D
        m = m_row[:, None] & m_d[None, :]
        b_x = sum_of_two(p_x, p_update, o_x + o_d[None, :], o_update + o_d[None, :], m, HAS_UPDATE)
        b_q = tl.load(p_basis + o_k[None, :] * D + o_d[:, None], mask=m_d[:, None] & m_k[None, :], other=0.0)
        b_c += tl.dot(b_x, b_q, input_precision="ieee")
    b_c *= scale
    b_sum = tl.zeros([ROWS], tl.float32)
    b_squares = tl.zeros([ROWS], tl.float32)
    for first in range(0, D, CHUNK):
        o_d = first + tl.arange(0, CHUNK)
        m_d = o_d < D
        m = m_row[:, None] & m_d[None, :]
        b_x = sum_of_two(p_x, p_update, o_x + o_d[None, :], o_update + o_d[None, :], m, HAS_UPDATE)
        b_q = tl.load(p_basis + o_k[:, None] * D + o_d[None, :], mask=m_k[:, None] & m_d[None, :], other=0.0)
        b_y = (b_x - tl.dot(b_c, b_q, input_precision="ieee")).to(p_out.dtype.element_ty)
        tl.store(p_out + o_out + o_d[None, :], b_y, mask=m)
        b_x = tl.where(m, b_y.to(tl.float32), 0.0)
        b_sum += tl.sum(b_x, 1)
        b_squares += tl.sum(b_x * b_x, 1)
    if NORM is not None:
        tl.debug_barrier()  # what follows reads what other threads stored
        b_mean = b_sum * 0.0
        if NORM == 2:
            b_mean = b_sum / D
            b_squares = b_squares * 0.0
            for first in range(0, D, CHUNK):
                o_d = first + tl.arange(0, CHUNK)
                m = m_row[:, None] & (o_d < D)[None, :]
                b_y = tl.load(p_out + o_out + o_d[None, :], mask=m, other=0.0).to(tl.float32)
                b_y = tl.where(m, b_y - b_mean[:, None], 0.0)
                b_squares += tl.sum(b_y * b_y, 1)
        b_inverse = 1.0 / tl.sqrt(b_squares / D + eps)
        for first in range(0, D, CHUNK):
            o_d = first + tl.arange(0, CHUNK)
            m = m_row[:, None] & (o_d < D)[None, :]
            b_y = tl.load(p_out + o_out + o_d[None, :], mask=m, other=0.0).to(tl.float32)
            b_y = scaled(b_y, b_mean, b_inverse, p_weight, p_bias, o_d, o_d < D, NORM)
            tl.store(
                p_normed + o_row.to(tl.int64)[:, None] * D + o_d[None, :], b_y.to(p_normed.dtype.element_ty), mask=m
            )


@triton.jit
def weight_of(p_weight, o_d, m_d, NORM: tl.constexpr):
    """The factor of each feature: 1 where there is no weight, 1 + weight for Gemma's norms (NORM 1)."""
    if p_weight is None:
        b_w = (o_d * 0 + 1).to(tl.float32)
    else:
        b_w = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
        if NORM == 1:
            b_w += 1.0
    return b_w


@triton.jit
def scaled(b_y, b_mean, b_inverse, p_weight, p_bias, o_d, m_d, NORM: tl.constexpr):
    """Rows normed, times the weight, plus the bias."""
    b_out = (b_y - b_mean[:, None]) * b_inverse[:, None] * weight_of(p_weight, o_d, m_d, NORM)[None, :]
    if p_bias is not None:
        b_out += tl.load(p_bias + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    return b_out


def row_tile(width: int, per_warp: int = 1024) -> dict[str, Any]:
    """Rows and features of a program's tile, and its warps, each with so many elements."""
    block = triton.next_power_of_2(width)
    rows = max(1, ELEMENTS // block)
    return {"ROWS": rows, "BLOCK": block, "num_warps": max(1, min(16, rows * block // per_warp))}


@on_device
def project_tile(
    x: Tensor, update: Tensor | None, basis: Tensor, scale: float, out: Tensor, norm: tuple[Any, ...] | None = None
) -> None:
    """``project_tile_kernel`` over rows x [N, D] and one basis [1, K, D].

    norm: (its number, weight, bias, eps, where the normed rows go), or None.
    """
    kind, weight, bias, eps, normed = norm or (None, None, None, 0.0, None)
    n, width = x.shape
    directions = max(16, triton.next_power_of_2(basis.shape[1]))
    project_tile_kernel[(triton.cdiv(n, TILE["ROWS"]),)](
        x, update, basis, weight, bias, out, normed, n, width, basis.shape[1], scale, eps,
        x.stride(0), 0 if update is None else update.stride(0), out.stride(0),
        **TILE, DIRECTIONS=directions, HAS_UPDATE=update is not None, NORM=kind,
    )  # fmt: skip


def each_of(index: Tensor | None, n: int) -> int:
    """How many consecutive rows an entry of the index stands for."""
    return 1 if index is None else n // index.shape[0]


@on_device
def forward(x: Tensor, basis: Tensor, index: Tensor | None, scale: float, preserve: bool, out: Tensor) -> None:
    """See ``portable.forward``."""
    n, width = x.shape
    if x.dtype == torch.float64:
        portable.forward(x, basis, index, scale, preserve, out)
    elif index is None and not preserve and (basis.shape[1] > FEW or width > MAX_WIDTH):
        project_tile(x, None, basis, scale, out)
    elif width > MAX_WIDTH:
        portable.forward(x, basis, index, scale, preserve, out)
    else:
        flags = row_tile(width)
        project_kernel[(triton.cdiv(n, flags["ROWS"]),)](
            x, basis, index, out, n, width, basis.shape[1], each_of(index, n), scale, x.stride(0), out.stride(0),
            HAS_INDEX=index is not None, PRESERVE=preserve, **flags,
        )  # fmt: skip


@on_device
def backward(grad: Tensor, x: Tensor, basis: Tensor, index: Tensor | None, scale: float, dx: Tensor) -> None:
    """See ``portable.backward``."""
    n, width = x.shape
    if x.dtype == torch.float64 or width > MAX_GRADIENT_WIDTH:
        portable.backward(grad, x, basis, index, scale, dx)
        return
    flags = row_tile(width)
    project_gradient_kernel[(triton.cdiv(n, flags["ROWS"]),)](
        grad, x, basis, index, dx, n, width, basis.shape[1], each_of(index, n), scale,
        grad.stride(0), x.stride(0), dx.stride(0), HAS_INDEX=index is not None, **flags,
    )  # fmt: skip
