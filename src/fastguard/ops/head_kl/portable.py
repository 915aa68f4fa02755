"""``head_kl`` by tiles of rows: products by torch, element-wise code by torch.

The tile loop is shared: ``cpu.py`` runs it with C++ in place of the two element-wise functions (`TileKernels`). At most
one tile of logits and one of differences ([TILE, V] each) is alive at a time.

How a row is summed. With m_t and m_s the largest logits of teacher and student, e_t = exp(z_t - m_t),
e_s = exp(z_s - m_s) and u = (z_t - z_s) - (m_t - m_s), which is small where the student is near,

    S_t = sum e_t,  S_s = sum e_s,  U = sum e_t u,  A = sum e_t (exp(-u) - 1) = S_s - S_t,  B = sum e_t phi(u),

phi(u) = exp(-u) - 1 + u >= 0. Then lse_t - lse_s = (m_t - m_s) - log(S_s / S_t), and the divergence is

    U / S_t + log(S_s / S_t)  =  B / S_t - (x - log(1 + x)),  x = A / S_t.

The right-hand side is for S_s near S_t: its terms are of second order in u, as the divergence is, where those of
the left are of first order and cancel. For S_s far from S_t the left has nothing to cancel.

Shapes: N rows, R rows of one tile, V vocabulary, D hidden size.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastguard.ops.precision import accumulation_dtype
from fastguard.ops.vocabulary import Head

TILE = 128
"""Rows of a tile; both models' rows go through one product where they share a head."""

NEAR = 0.5
"""Below this |u| (|x| for the sums) the series and the second-order form are used."""


class Row(NamedTuple):
    """Per row, each [R] for a tile or [N] for a call: the divergence, lse_t and lse_t - lse_s."""

    kl: Tensor
    lse: Tensor
    gap: Tensor


class TileKernels(Protocol):
    """The element-wise work on one tile: the teacher's raw products z and what the student's lack of them, d.

    Both are in the accumulation dtype, as is the bias of the head that comes with them.
    """

    def statistics(self, z: Tensor, d: Tensor, head: Head) -> Row:
        """Reduce z and d [R, V], in the accumulation dtype, and leave in them the logits: see ``ready`` below."""

    def gradient(self, z: Tensor, d: Tensor, head: Head, lse: Tensor, gap: Tensor, grad: Tensor, ready: bool) -> None:
        """Turn d into the gradient at the student's raw products, in place; z may be overwritten.

        ready: z and d are not products but what ``statistics`` made of them, teacher's logits and their lead.
        """


def phi(u: Tensor, e_t: Tensor, e_s: Tensor) -> Tensor:
    """e_t (exp(-u) - 1 + u), where e_s is e_t exp(-u)."""
    last = 15 if u.dtype == torch.float64 else 9
    series = torch.full_like(u, 1 / math.factorial(last))
    for k in range(last - 1, 1, -1):
        series = 1 / math.factorial(k) - u * series
    return torch.where(u.abs() < NEAR, e_t * u * u * series, (e_s - e_t) + e_t * u)


def excess(x: Tensor) -> Tensor:
    """x - log(1 + x), by its series near 0."""
    last = 17 if x.dtype == torch.float64 else 9
    series = torch.full_like(x, 1 / last)
    for k in range(last - 1, 1, -1):
        series = 1 / k - x * series
    return torch.where(x.abs() < 0.1, x * x * series, x - torch.log1p(x))


def _transform(z: Tensor, d: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """The teacher's logits, and how far they are above the student's."""
    if head.bias is not None:
        z = z + head.bias
    z, d = z * head.scale, d * head.scale
    if not head.softcap:
        return z, d
    t, s = torch.tanh(z / head.softcap), torch.tanh((z - d) / head.softcap)
    # tanh a - tanh b, without cancellation
    return head.softcap * t, head.softcap * torch.tanh(d / head.softcap) * (1 - t * s)


class TorchKernels:
    """`TileKernels` in plain torch: any device."""

    def statistics(self, z: Tensor, d: Tensor, head: Head) -> Row:
        """See `TileKernels.statistics`."""
        for raw, made in zip((z, d), _transform(z, d, head), strict=True):
            raw.copy_(made)
        zs = z - d
        top_t, top_s = z.amax(1), zs.amax(1)
        e_t, e_s = torch.exp(z - top_t[:, None]), torch.exp(zs - top_s[:, None])
        u = d - (top_t - top_s)[:, None]
        f, w = phi(u, e_t, e_s), e_t * u
        # A by way of f where u is small: e_s - e_t would cancel.
        a = torch.where(u.abs() < NEAR, f - w, e_s - e_t).sum(1)
        s_t, s_s = e_t.sum(1), e_s.sum(1)
        x, ratio = a / s_t, torch.log(s_s / s_t)
        near = x.abs() < NEAR
        kl = torch.where(near, f.sum(1) / s_t - excess(x), w.sum(1) / s_t + ratio)
        gap = (top_t - top_s) - torch.where(near, torch.log1p(x), ratio)
        return Row(kl, top_t + torch.log(s_t), gap)

    def gradient(self, z: Tensor, d: Tensor, head: Head, lse: Tensor, gap: Tensor, grad: Tensor, ready: bool) -> None:
        """See `TileKernels.gradient`."""
        out = d
        if not ready:
            z, d = _transform(z, d, head)
        u = d - gap[:, None]  # log p_t - log p_s
        p_t, p_s = torch.exp(z - lse[:, None]), torch.exp(z - d - (lse - gap)[:, None])
        g = torch.where(u.abs() < NEAR, phi(u, p_t, p_s) - p_t * u, p_s - p_t) * (grad * head.scale)[:, None]
        if head.softcap:
            g = g * (1 - ((z - d) / head.softcap).square())
        out.copy_(g)


class Products:
    """The raw products of the teacher's rows and their difference from the student's, a tile at a time.

    With one head for both, the difference is a product of its own, of the difference of the hidden states; with two
    it is what is left of the two models' products. Half precision is widened after the product.
    """

    def __init__(self, student: Tensor, teacher: Tensor, weight: Tensor, teacher_weight: Tensor | None) -> None:
        self.teacher, self.weight, self.teacher_weight = teacher, weight, teacher_weight
        self.other = teacher - student if teacher_weight is None else student
        rows, v = 2 * min(TILE, student.shape[0]), weight.shape[0]
        self.wide = accumulation_dtype(student.dtype)
        self.buffer = torch.empty(rows, v, dtype=student.dtype, device=student.device)
        self.widened = self.buffer if self.wide == student.dtype else torch.empty_like(self.buffer, dtype=self.wide)

    def __call__(self, rows: slice) -> tuple[Tensor, Tensor]:
        """(z, d), each [R, V]: views of buffers that the next call overwrites."""
        n = rows.stop - rows.start
        both, out = self.buffer[: 2 * n], self.widened[: 2 * n]
        if self.teacher_weight is None:
            torch.mm(torch.cat([self.teacher[rows], self.other[rows]]), self.weight.t(), out=both)
        else:
            torch.mm(self.teacher[rows], self.teacher_weight.t(), out=both[:n])
            torch.mm(self.other[rows], self.weight.t(), out=both[n:])
        if out.dtype != both.dtype:
            out.copy_(both)
        if self.teacher_weight is not None:
            torch.sub(out[:n], out[n:], out=out[n:])
        return out[:n], out[n:]


def forward(
    student: Tensor,
    teacher: Tensor,
    head: Head,
    teacher_weight: Tensor | None,
    ahead: bool,
    kernels: TileKernels | None = None,
) -> tuple[Row, Tensor | None]:
    """The divergence of each row and what the backward needs of it.

    ahead: also each divergence's gradient at ``student`` [N, D], in the accumulation dtype; otherwise None.
    """
    kernels = kernels or TorchKernels()
    n, wide = student.shape[0], accumulation_dtype(student.dtype)
    out = Row(*(torch.empty(n, dtype=wide, device=student.device) for _ in Row._fields))
    products = Products(student, teacher, head.weight, teacher_weight)
    tile = _widened(head, wide)
    slope = torch.empty(student.shape, dtype=wide, device=student.device) if ahead else None
    ones = torch.ones(min(TILE, n), dtype=wide, device=student.device)
    for rows in tiles(n):
        z, d = products(rows)
        row = kernels.statistics(z, d, tile)
        for whole, part in zip(out, row, strict=True):
            whole[rows] = part
        if slope is not None:
            kernels.gradient(z, d, tile, row.lse, row.gap, ones[: len(z)], ready=True)
            slope[rows] = d.to(student.dtype) @ head.weight
    return out, slope


def backward(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    head: Head,
    teacher_weight: Tensor | None,
    lse: Tensor,
    gap: Tensor,
    need_student: bool,
    need_weight: bool,
    need_bias: bool,
    kernels: TileKernels | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of student, weight and bias in the accumulation dtype, None where not needed; grad [N] in it too."""
    kernels = kernels or TorchKernels()
    wide, device = accumulation_dtype(student.dtype), student.device
    dstudent = torch.empty(student.shape, dtype=wide, device=device) if need_student else None
    dweight = torch.zeros(head.weight.shape, dtype=wide, device=device) if need_weight else None
    dbias = torch.zeros(head.weight.shape[:1], dtype=wide, device=device) if need_bias else None
    products = Products(student, teacher, head.weight, teacher_weight)
    tile = _widened(head, wide)
    for rows in tiles(student.shape[0]):
        z, g = products(rows)
        kernels.gradient(z, g, tile, lse[rows], gap[rows], grad[rows], ready=False)
        narrow = g.to(student.dtype)
        if dstudent is not None:
            dstudent[rows] = narrow @ head.weight
        if dweight is not None:
            if wide == student.dtype:
                dweight.addmm_(g.t(), student[rows])
            else:
                dweight.add_(narrow.t() @ student[rows])
        if dbias is not None:
            dbias.add_(g.sum(0))
    return dstudent, dweight, dbias


def _widened(head: Head, wide: torch.dtype) -> Head:
    """The head with the bias that `TileKernels` read."""
    return head if head.bias is None else replace(head, bias=head.bias.to(wide).contiguous())


def tiles(n: int) -> list[slice]:
    """The rows of each tile."""
    return [slice(start, min(start + TILE, n)) for start in range(0, n, TILE)]
