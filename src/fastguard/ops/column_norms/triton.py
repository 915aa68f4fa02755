# mypy: disallow-untyped-defs=False
# (the arguments of a kernel are pointers and scalars of Triton's own; only constexprs can be annotated)
"""``column_norms_`` on GPUs, in Triton.

A program takes BLOCK features through every n_parts-th chunk of rows of one sample. Within a chunk each lane adds STEPS
squares in fp32, so few that the bound on their rounding stays below 1e-6; what lanes and chunks have is added in
float64. (Squares beyond fp32's range, of numbers below 1e-19 or above 1e19, are its zeros and infinities.)

Prefixes: p_ pointer, o_ offsets, m_ mask, b_ block of values. Shapes: N rows of B samples, I features.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

import triton
from fastguard.ops.launch import on_device

ROWS, BLOCK, STEPS = 32, 64, 8
"""Rows and features of a tile; tiles of a chunk."""
PROGRAMS = 1024
"""Programs that fill a GPU: samples are divided among parts until there are as many."""
MAX_PARTS = 64


@triton.jit
def squares_kernel(
    p_x, p_bounds, p_out, n_blocks, n_parts, width, stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """out [B, n_parts, I] in float64; see ``portable.squares``. WIDE: the dtype of squares."""
    o_i = tl.program_id(0) % n_blocks * BLOCK + tl.arange(0, BLOCK)
    b = (tl.program_id(0) // n_blocks).to(tl.int64)
    part = tl.program_id(1)
    m_i = o_i < width
    begin = tl.load(p_bounds + 2 * b)
    end = tl.load(p_bounds + 2 * b + 1)
    b_total = tl.zeros([BLOCK], tl.float64)
    for chunk in range(begin + part * ROWS * STEPS, end, n_parts * ROWS * STEPS):
        b_sum = tl.zeros([ROWS, BLOCK], WIDE)
        for step in range(STEPS):
            o_row = chunk + step * ROWS + tl.arange(0, ROWS)
            m = (o_row < end)[:, None] & m_i[None, :]
            b_x = tl.load(p_x + o_row[:, None] * stride + o_i[None, :], mask=m, other=0.0).to(WIDE)
            b_sum += b_x * b_x
        b_total += tl.sum(b_sum.to(tl.float64), 0)
    tl.store(p_out + (b * n_parts + part) * width + o_i, b_total, mask=m_i)


@on_device
def squares(x: Tensor, bounds: Tensor, out: Tensor) -> None:
    """See ``portable.squares``."""
    samples, width = bounds.shape[0], x.shape[1]
    blocks = triton.cdiv(width, BLOCK)
    chunks = triton.cdiv(x.shape[0], ROWS * STEPS)  # that one sample can have at most
    parts = max(1, min(triton.cdiv(PROGRAMS, blocks * samples), chunks, MAX_PARTS))
    partial = torch.empty(samples, parts, width, dtype=torch.float64, device=x.device)
    squares_kernel[(blocks * samples, parts)](
        x, bounds, partial, blocks, parts, width, x.stride(0), ROWS=ROWS, BLOCK=BLOCK, STEPS=STEPS,
        WIDE=tl.float64 if x.dtype == torch.float64 else tl.float32, num_warps=4,
    )  # fmt: skip
    own = partial.sum(1)
    out += own if out.shape[0] == samples else own.sum(0)
