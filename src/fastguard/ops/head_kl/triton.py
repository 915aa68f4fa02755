# mypy: disallow-untyped-defs=False
# (the arguments of a kernel are pointers and scalars of Triton's own; only constexprs can be annotated)
"""``head_kl`` on GPUs, in Triton; float64 inputs are handed to ``portable.py`` (no tensor cores to gain).

Forward, one pass over both models' logits (4 N D V flops) and none in memory:

1. ``scan_kernel``: a program owns (ROWS rows, one part of V) and keeps, per row, both running maxima and the five sums
   of ``portable.py`` relative to them. When a maximum rises, `shift` moves the sums, second-order ones included;
2. ``combine_kernel``: the same move brings the parts of a row together, in order (no atomics).

Backward, in windows of V: ``dlogit_kernel`` makes the products again and writes the gradient at the student's logits,
[N, W]; the products with it are dense, and cuBLAS's.

Products run in the input dtype with fp32 accumulation. float32 with one head multiplies the difference of the hidden
states (DIFFERENCE), exactly ("ieee") unless ``torch.set_float32_matmul_precision`` allows TF32. Half precision
subtracts the two products, which are still in fp32: rounding the difference of the hidden states would cost more.

Prefixes: p_ pointer, i_ index of a program or step, o_ offsets, m_ mask, b_ block of values, n_ count.
A pointer (or soft-cap) that is None is absent: a kernel is compiled for what it is given.
Shapes: N rows, V vocabulary, D hidden size, S parts of V, W columns of a window.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

import triton
from fastguard.ops import table
from fastguard.ops.head_kl import portable
from fastguard.ops.launch import chip, on_device, precision, processors
from fastguard.ops.lm_head_stats.triton.pieces import logits
from fastguard.ops.lm_head_stats.triton.scan import _parts
from fastguard.ops.vocabulary import Head

WINDOW_ELEMENTS = 2**26
"""Most elements of dlogits alive at a time: 128 MB in bf16."""

NEGATIVE = tl.constexpr(-1.0e30)
NEAR = tl.constexpr(portable.NEAR)


class Blocks(NamedTuple):
    """Shape of a program of both matrix kernels: rows, columns, features a step; warps, pipeline stages."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


def config(dtype: torch.dtype, width: int, chip: table.Chip) -> Blocks:
    """Block shapes for hidden states of a dtype and of ``width`` features on a chip."""
    return table.find("head_kl", table.classes(dtype, width), chip, Blocks)


@triton.jit
def products(
    p_t, p_s, p_w, p_wt, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """T @ Wt^T and S @ W^T in fp32; p_t, p_s [ROWS] and p_w, p_wt [COLUMNS] point at row starts; no p_wt is p_w."""
    b_zt = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    b_zs = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    o_k = tl.arange(0, BLOCK_K)
    for k in range(0, D, BLOCK_K):
        if EVEN:
            b_t = tl.load(p_t[:, None] + (k + o_k)[None, :])
            b_s = tl.load(p_s[:, None] + (k + o_k)[None, :])
            b_w = tl.load(p_w[:, None] + (k + o_k)[None, :])
            b_wt = tl.load(p_wt[:, None] + (k + o_k)[None, :]) if p_wt is not None else b_w
        else:
            m_k = (k + o_k)[None, :] < D
            b_t = tl.load(p_t[:, None] + (k + o_k)[None, :], mask=m_k, other=0.0)
            b_s = tl.load(p_s[:, None] + (k + o_k)[None, :], mask=m_k, other=0.0)
            b_w = tl.load(p_w[:, None] + (k + o_k)[None, :], mask=m_k, other=0.0)
            b_wt = tl.load(p_wt[:, None] + (k + o_k)[None, :], mask=m_k, other=0.0) if p_wt is not None else b_w
        b_zt = tl.dot(b_t, tl.trans(b_wt), b_zt, input_precision=PRECISION)
        b_zs = tl.dot(b_s, tl.trans(b_w), b_zs, input_precision=PRECISION)
    return b_zt, b_zs


@triton.jit
def teacher_and_lack(
    p_t, p_s, p_weight, p_own, p_bias, o_v, V, D, scale, softcap,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr, DIFFERENCE: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The teacher's logits of the columns o_v, and how far they are above the student's."""
    o_w = tl.minimum(o_v, V - 1).to(tl.int64) * D
    p_wt = p_own + o_w if p_own is not None else None
    b_z, b_d = products(p_t, p_s, p_weight + o_w, p_wt, D, ROWS, COLUMNS, BLOCK_K, EVEN, PRECISION)
    if not DIFFERENCE:
        b_d = b_z - b_d
    b_bias = tl.load(p_bias + o_v, mask=o_v < V, other=0.0).to(tl.float32)[None, :] if p_bias is not None else 0.0
    if softcap is not None:
        b_t = logits(b_z, b_bias, scale, softcap) / softcap
        b_s = logits(b_z - b_d, b_bias, scale, softcap) / softcap
        b_d = logits(b_d, 0.0, scale, softcap) * (1.0 - b_t * b_s)  # tanh a - tanh b
        b_z = softcap * b_t
    else:
        b_z = (b_z + b_bias) * scale
        b_d = b_d * scale
    return b_z, b_d


@triton.jit
def orders(b_u, b_t, b_s):
    """b_t (exp(-u) - 1) and b_t (exp(-u) - 1 + u), where b_s = b_t exp(-u)."""
    b_p = 2.4801587e-5 - b_u * 2.7557319e-6
    b_p = 1.9841270e-4 - b_u * b_p
    b_p = 1.3888889e-3 - b_u * b_p
    b_p = 8.3333333e-3 - b_u * b_p
    b_p = 4.1666667e-2 - b_u * b_p
    b_p = 1.6666667e-1 - b_u * b_p
    b_weighted = b_t * b_u
    b_series = b_weighted * b_u * (0.5 - b_u * b_p)
    b_far = b_s - b_t
    m_near = tl.abs(b_u) < NEAR
    return tl.where(m_near, b_series - b_weighted, b_far), tl.where(m_near, b_series, b_far + b_weighted)


@triton.jit
def shift(state, b_new_t, b_new_s):
    """A row's maxima and the sums relative to them, moved to the maxima new: u of every element grows by v."""
    b_top_t, b_top_s, b_st, b_ss, b_u, b_a, b_b = state
    b_shrink_t, b_shrink_s = tl.exp(b_top_t - b_new_t), tl.exp(b_top_s - b_new_s)
    b_v = (b_top_t - b_top_s) - (b_new_t - b_new_s)  # in this order: exact where the student is near
    b_first, b_second = orders(b_v, b_shrink_t, b_shrink_s)
    b_b = b_shrink_t * b_b + b_first * b_a + b_second * b_st
    b_a = b_shrink_s * b_a + b_first * b_st
    b_u = b_shrink_t * (b_u + b_v * b_st)
    return b_new_t, b_new_s, b_shrink_t * b_st, b_shrink_s * b_ss, b_u, b_a, b_b


@triton.jit
def load_state(p_sums, N, m_n):
    """A row's maxima and sums from sums [7, N]."""
    return (
        tl.load(p_sums, mask=m_n, other=0.0), tl.load(p_sums + N, mask=m_n, other=0.0),
        tl.load(p_sums + 2 * N, mask=m_n, other=1.0), tl.load(p_sums + 3 * N, mask=m_n, other=1.0),
        tl.load(p_sums + 4 * N, mask=m_n, other=0.0), tl.load(p_sums + 5 * N, mask=m_n, other=0.0),
        tl.load(p_sums + 6 * N, mask=m_n, other=0.0),
    )  # fmt: skip


@triton.jit
def scan_kernel(
    p_teacher, p_student, p_weight, p_own, p_bias, p_sums, N, V, D, n_blocks, scale, softcap,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr, DIFFERENCE: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums of ROWS rows over ``n_blocks`` blocks of columns: sums [S, 7, N], both maxima and S_t, S_s, U, A, B."""
    i_part = tl.program_id(1)
    o_n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_n = o_n < N
    o_row = tl.minimum(o_n, N - 1).to(tl.int64) * D
    b_lowest = tl.full([ROWS], NEGATIVE, tl.float32)
    b_none = tl.zeros([ROWS], dtype=tl.float32)
    state = b_lowest, b_lowest, b_none, b_none, b_none, b_none, b_none
    for i_block in range(i_part * n_blocks, tl.minimum((i_part + 1) * n_blocks, tl.cdiv(V, COLUMNS))):
        o_v = i_block * COLUMNS + tl.arange(0, COLUMNS)
        b_z, b_d = teacher_and_lack(
            p_teacher + o_row, p_student + o_row, p_weight, p_own, p_bias, o_v, V, D, scale, softcap,
            ROWS, COLUMNS, BLOCK_K, DIFFERENCE, EVEN, PRECISION,
        )  # fmt: skip
        # Absent columns repeat the last one: they raise no maximum, and are taken out of the sums.
        b_new_t = tl.maximum(state[0], tl.max(b_z, 1))
        b_new_s = tl.maximum(state[1], tl.max(b_z - b_d, 1))
        b_top_t, b_top_s, b_st, b_ss, b_u, b_a, b_b = shift(state, b_new_t, b_new_s)
        m_v = (o_v < V)[None, :]
        b_et = tl.where(m_v, tl.exp(b_z - b_top_t[:, None]), 0.0)
        b_es = tl.where(m_v, tl.exp(b_z - b_d - b_top_s[:, None]), 0.0)
        b_d -= (b_top_t - b_top_s)[:, None]
        b_first, b_second = orders(b_d, b_et, b_es)
        b_st += tl.sum(b_et, 1)
        b_ss += tl.sum(b_es, 1)
        b_u += tl.sum(b_et * b_d, 1)
        b_a += tl.sum(b_first, 1)
        b_b += tl.sum(b_second, 1)
        state = b_top_t, b_top_s, b_st, b_ss, b_u, b_a, b_b
    p_out = p_sums + i_part.to(tl.int64) * 7 * N + o_n
    for i in tl.static_range(7):
        tl.store(p_out + i * N, state[i], mask=m_n)


@triton.jit
def log1p_excess(b_x):
    """x - log(1 + x) for |x| < 1/2: by its series near 0, where the difference would cancel."""
    b_p = 1.0 / 8 - b_x * (1.0 / 9)
    b_p = 1.0 / 7 - b_x * b_p
    b_p = 1.0 / 6 - b_x * b_p
    b_p = 1.0 / 5 - b_x * b_p
    b_p = 1.0 / 4 - b_x * b_p
    b_p = 1.0 / 3 - b_x * b_p
    b_far = b_x - tl.log(tl.maximum(1.0 + b_x, 0.25))
    return tl.where(tl.abs(b_x) < 0.1, b_x * b_x * (0.5 - b_x * b_p), b_far)


@triton.jit
def combine_kernel(p_sums, p_kl, p_lse, p_gap, N, n_parts, BLOCK: tl.constexpr):
    """The parts of each row together: the divergence, lse_t and lse_t - lse_s, each [N]."""
    o_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < N
    state = load_state(p_sums + o_n, N, m_n)
    for i_part in range(1, n_parts):
        part = load_state(p_sums + tl.cast(i_part, tl.int64) * 7 * N + o_n, N, m_n)
        b_new_t, b_new_s = tl.maximum(state[0], part[0]), tl.maximum(state[1], part[1])
        _, _, b_st, b_ss, b_u, b_a, b_b = shift(state, b_new_t, b_new_s)
        _, _, b_st2, b_ss2, b_u2, b_a2, b_b2 = shift(part, b_new_t, b_new_s)
        state = b_new_t, b_new_s, b_st + b_st2, b_ss + b_ss2, b_u + b_u2, b_a + b_a2, b_b + b_b2
    b_top_t, b_top_s, b_st, b_ss, b_u, b_a, b_b = state
    b_x, b_ratio = b_a / b_st, tl.log(b_ss / b_st)
    m_near = tl.abs(b_x) < NEAR
    b_excess = log1p_excess(b_x)
    b_kl = tl.where(m_near, b_b / b_st - b_excess, b_u / b_st + b_ratio)
    tl.store(p_kl + o_n, b_kl, mask=m_n)
    tl.store(p_lse + o_n, b_top_t + tl.log(b_st), mask=m_n)
    tl.store(p_gap + o_n, (b_top_t - b_top_s) - tl.where(m_near, b_x - b_excess, b_ratio), mask=m_n)


@triton.jit
def dlogit_kernel(
    p_grad, p_teacher, p_student, p_weight, p_own, p_bias, p_lse, p_gap, p_dlogit, N, V, D, first, width,
    scale, softcap,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr, DIFFERENCE: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient at the student's raw products of the columns first, first + 1, ...: dlogit [N, width]."""
    o_n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_n = o_n < N
    o_row = tl.minimum(o_n, N - 1).to(tl.int64) * D
    o_w = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    b_z, b_d = teacher_and_lack(
        p_teacher + o_row, p_student + o_row, p_weight, p_own, p_bias, first + o_w, V, D, scale, softcap,
        ROWS, COLUMNS, BLOCK_K, DIFFERENCE, EVEN, PRECISION,
    )  # fmt: skip
    b_lse = tl.load(p_lse + o_n, mask=m_n, other=0.0)
    b_gap = tl.load(p_gap + o_n, mask=m_n, other=0.0)
    b_g = tl.load(p_grad + o_n, mask=m_n, other=0.0) * scale
    b_s = b_z - b_d
    b_pt = tl.exp(b_z - b_lse[:, None])
    b_ps = tl.exp(b_s - (b_lse - b_gap)[:, None])
    b_first, _ = orders(b_d - b_gap[:, None], b_pt, b_ps)
    b_out = b_first * b_g[:, None]
    if softcap is not None:
        b_y = b_s / softcap
        b_out *= 1.0 - b_y * b_y
    m = m_n[:, None] & (o_w < width)[None, :]
    p_out = p_dlogit + o_n.to(tl.int64)[:, None] * width + o_w[None, :]
    tl.store(p_out, b_out.to(p_dlogit.dtype.element_ty), mask=m)


def _operands(
    student: Tensor, teacher: Tensor, weight: Tensor, teacher_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, bool]:
    """(teacher, student or the teacher's lead over it, weight, teacher_weight, whether it is the latter)."""
    difference = teacher_weight is None and student.dtype == torch.float32
    other = teacher - student if difference else student
    own = None if teacher_weight is None else teacher_weight.contiguous()
    return teacher.contiguous(), other.contiguous(), weight.contiguous(), own, difference


@on_device
def forward(
    student: Tensor, teacher: Tensor, head: Head, teacher_weight: Tensor | None, ahead: bool
) -> tuple[portable.Row, Tensor | None]:
    """The divergence of each row and what the backward needs of it. Signature and meaning of ``portable.forward``."""
    if student.dtype == torch.float64:
        return portable.forward(student, teacher, head, teacher_weight, ahead)
    t, s, w, own, difference = _operands(student, teacher, head.weight, teacher_weight)
    (n, d), v = t.shape, w.shape[0]
    out = portable.Row(*(torch.empty(n, dtype=torch.float32, device=t.device) for _ in range(3)))
    if not n:
        return out, torch.empty(0, d, dtype=torch.float32, device=t.device) if ahead else None
    blocks = config(t.dtype, d, chip(t.device))
    tiles, n_blocks = triton.cdiv(n, blocks.rows), triton.cdiv(v, blocks.columns)
    per_part = triton.cdiv(n_blocks, _parts(tiles, n_blocks, processors(t.device)))
    parts = triton.cdiv(n_blocks, per_part)  # none is empty
    sums = torch.empty(parts, 7, n, dtype=torch.float32, device=t.device)
    scan_kernel[tiles, parts](
        t, s, w, own, head.bias, sums, n, v, d, per_part, head.scale, head.softcap,
        ROWS=blocks.rows, COLUMNS=blocks.columns, BLOCK_K=blocks.inner, DIFFERENCE=difference,
        EVEN=d % blocks.inner == 0, PRECISION=precision(), num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    combine_kernel[triton.cdiv(n, 128),](sums, *out, n, parts, BLOCK=128)
    slope = None
    if ahead:
        ones = torch.ones_like(out.kl)
        slope, _, _ = backward(ones, student, teacher, head, teacher_weight, out.lse, out.gap, True, False, False)
    return out, slope


@on_device
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
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of student (fp32), weight (its dtype) and bias (fp32). Signature of ``portable.backward``."""
    if student.dtype == torch.float64:
        return portable.backward(
            grad, student, teacher, head, teacher_weight, lse, gap, need_student, need_weight, need_bias
        )
    t, s, w, own, difference = _operands(student, teacher, head.weight, teacher_weight)
    (n, d), v = t.shape, w.shape[0]
    dstudent = torch.zeros(n, d, dtype=torch.float32, device=t.device) if need_student else None
    dweight = torch.zeros(v, d, dtype=w.dtype, device=t.device) if need_weight else None
    dbias = torch.zeros(v, dtype=torch.float32, device=t.device) if need_bias else None
    if not n:
        return dstudent, dweight, dbias
    blocks = config(t.dtype, d, chip(t.device))
    width = min(max(WINDOW_ELEMENTS // n // blocks.columns, 1) * blocks.columns, v)
    for first in range(0, v, width):
        columns = slice(first, min(first + width, v))
        n_columns = columns.stop - first
        dlogit = torch.empty(n, n_columns, dtype=t.dtype, device=t.device)
        dlogit_kernel[triton.cdiv(n, blocks.rows), triton.cdiv(n_columns, blocks.columns)](
            grad, t, s, w, own, head.bias, lse, gap, dlogit, n, v, d, first, n_columns, head.scale, head.softcap,
            ROWS=blocks.rows, COLUMNS=blocks.columns, BLOCK_K=blocks.inner, DIFFERENCE=difference,
            EVEN=d % blocks.inner == 0, PRECISION=precision(), num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
        if dstudent is not None:
            dstudent += dlogit @ w[columns]
        if dweight is not None:
            torch.mm(dlogit.t(), student, out=dweight[columns])
        if dbias is not None:
            dbias[columns] = dlogit.sum(0, dtype=torch.float32)
    return dstudent, dweight, dbias
