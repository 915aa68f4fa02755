# mypy: disallow-untyped-defs=False
# (the arguments of a kernel are pointers and scalars of Triton's own; only constexprs can be annotated)
"""``abs_weight_grad_`` on GPUs, in Triton; float64 operands are handed to ``portable.py``.

A program owns a tile of the weight and goes through all samples: a sample's G is summed over its tokens in one
accumulator, on tensor cores, and what is wanted of it joins the others, all in registers. The states are read and
written once, at the end; nothing else is written.

Prefixes: p_ pointer, i_ index of a program or step, o_ offsets, m_ mask, b_ block of values.
Shapes: B samples, T tokens of each (all N rows where packed), O outputs, I inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

import triton
from fastguard.ops import table
from fastguard.ops.abs_weight_grad import portable
from fastguard.ops.launch import chip, on_device, precision

GROUP = tl.constexpr(8)
"""Tiles of outputs that neighbouring programs take together, so that they read the same inputs out of L2."""

PROGRAMS = 128
"""Fewer programs than this leave multiprocessors without work: tiles are smaller then."""


class Blocks(NamedTuple):
    """A program's tile of outputs by inputs, the tokens of a step, and what it is launched with."""

    outputs: int
    inputs: int
    tokens: int
    warps: int
    stages: int


def blocks_of(outputs: int, inputs: int, states: int, dtype: torch.dtype, chip: table.Chip) -> Blocks:
    """The tile for a weight [outputs, inputs]: what one accumulator and ``states`` sums leave room for in registers."""
    options = ["several sums"] if states > 1 else []
    large = table.find("abs_weight_grad", table.classes(dtype, inputs, *options), chip, Blocks)
    if triton.cdiv(outputs, large.outputs) * triton.cdiv(inputs, large.inputs) >= PROGRAMS:
        return large
    return table.find("abs_weight_grad", table.classes(dtype, inputs, *options, "few programs"), chip, Blocks)


@triton.jit
def rows_at(o_row, T, stride_sample, stride_token, FLAT: tl.constexpr):
    """Where rows begin, that are counted over all samples, as int64."""
    if FLAT:
        o = o_row * stride_token
    else:
        o = (o_row // T) * stride_sample + (o_row % T) * stride_token
    return o


@triton.jit
def add_to(p_state, b_sum, o, m):
    """Add a program's sums to its tile of a state."""
    tl.store(p_state + o, tl.load(p_state + o, mask=m) + b_sum, mask=m)


@triton.jit
def sums_kernel(
    p_score, p_squared, p_signed, p_dy, p_x, p_bounds, B, N, O, I, T,  # noqa: E741
    stride_dy_sample, stride_dy_token, stride_x_sample, stride_x_token,
    FLAT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """score, squared and signed [O, I], those that there are; see ``portable.update``. FLAT: rows have one stride."""
    n_i = tl.cdiv(I, BLOCK_I)
    i_o, i_i = tl.swizzle2d(tl.program_id(0) // n_i, tl.program_id(0) % n_i, tl.cdiv(O, BLOCK_O), n_i, GROUP)
    o_o = i_o * BLOCK_O + tl.arange(0, BLOCK_O)
    o_i = i_i * BLOCK_I + tl.arange(0, BLOCK_I)
    m_o = o_o < O
    m_i = o_i < I
    b_score = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    b_squared = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    b_signed = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    for b in range(B):
        begin = tl.maximum(tl.load(p_bounds + 2 * b), 0)  # no rows but those of the operands, whatever is asked for
        end = tl.minimum(tl.load(p_bounds + 2 * b + 1), N)
        b_g = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
        for start in range(begin, end, BLOCK_T):
            o_t = start + tl.arange(0, BLOCK_T)
            m_t = o_t < end
            # Read as what it is multiplied as: a block that is transposed afterwards is not copied ahead on sm_80.
            o_dy = rows_at(o_t, T, stride_dy_sample, stride_dy_token, FLAT)[None, :] + o_o[:, None]
            o_x = rows_at(o_t, T, stride_x_sample, stride_x_token, FLAT)[:, None] + o_i[None, :]
            b_dy = tl.load(p_dy + o_dy, mask=m_o[:, None] & m_t[None, :], other=0.0)
            b_x = tl.load(p_x + o_x, mask=m_t[:, None] & m_i[None, :], other=0.0)
            b_g = tl.dot(b_dy, b_x, b_g, input_precision=PRECISION)
        if p_score is not None:
            b_score += tl.abs(b_g)
        if p_squared is not None:
            b_squared += b_g * b_g
        if p_signed is not None:
            b_signed += b_g
    o = o_o.to(tl.int64)[:, None] * I + o_i[None, :]
    m = m_o[:, None] & m_i[None, :]
    if p_score is not None:
        add_to(p_score, b_score, o, m)
    if p_squared is not None:
        add_to(p_squared, b_squared, o, m)
    if p_signed is not None:
        add_to(p_signed, b_signed, o, m)


@on_device
def update(
    score: Tensor | None,
    squared: Tensor | None,
    signed: Tensor | None,
    grad_out: Tensor,
    input: Tensor,
    bounds: Tensor,
) -> None:
    """See ``portable.update``."""
    if grad_out.dtype == torch.float64:
        portable.update(score, squared, signed, grad_out, input, bounds)
        return
    dy, x = (t if t.dim() == 3 else t[None] for t in (grad_out, input))
    samples, tokens, outputs = dy.shape
    inputs = x.shape[-1]
    states = sum(t is not None for t in (score, squared, signed))
    blocks = blocks_of(outputs, inputs, states, grad_out.dtype, chip(x.device))
    programs = triton.cdiv(outputs, blocks.outputs) * triton.cdiv(inputs, blocks.inputs)
    sums_kernel[(programs,)](
        score, squared, signed, dy, x, bounds, bounds.shape[0], samples * tokens, outputs, inputs, tokens,
        dy.stride(0), dy.stride(1), x.stride(0), x.stride(1),
        FLAT=all(samples == 1 or t.stride(0) == tokens * t.stride(1) for t in (dy, x)), PRECISION=precision(),
        BLOCK_O=blocks.outputs, BLOCK_I=blocks.inputs, BLOCK_T=blocks.tokens,
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
