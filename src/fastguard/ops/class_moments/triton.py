# mypy: disallow-untyped-defs=False
# (the arguments of a kernel are pointers and scalars of Triton's own; only constexprs can be annotated)
"""``class_moments_`` on GPUs, in Triton.

A program takes BLOCK features of one position and one class through the batch, twice for the second moment (the second
time out of cache), in float64: few numbers, read once.

Prefixes: p_ pointer, o_ offsets, m_ mask, b_ block of values. Shapes: B samples, T tokens, D features, C classes, P
positions.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

import triton
from fastguard.ops.launch import on_device

BLOCK = 256


@triton.jit
def features_of(p_x, p_positions, b, o_p, o_d, m, T, stride_b, stride_t, stride_positions):
    """The block's features of sample b at its position o_p, in float64."""
    position = tl.load(p_positions + b * stride_positions + o_p)
    position = tl.where(position < 0, position + T, position)
    o_b = (position * 0 + b) * stride_b  # in int64, as positions are
    return tl.load(p_x + o_b + position * stride_t + o_d, mask=m, other=0.0).to(tl.float64)


@triton.jit
def exact(p_number, p_rest, o, m):
    """A number and what its rounding left."""
    b_value = tl.load(p_number + o, mask=m, other=0.0).to(tl.float64)
    if p_rest is not None:
        b_value += tl.load(p_rest + o, mask=m, other=0.0).to(tl.float64)
    return b_value


@triton.jit
def keep(b_value, p_number, p_rest, o, m):
    """Write a number and what its rounding left; nothing where it is not finite."""
    b_number = b_value.to(p_number.dtype.element_ty)
    tl.store(p_number + o, b_number, mask=m)
    if p_rest is not None:
        b_left = b_value - b_number.to(tl.float64)
        tl.store(p_rest + o, tl.where(b_left == b_left, b_left, 0.0).to(p_rest.dtype.element_ty), mask=m)


@triton.jit
def moments_kernel(
    p_count, p_mean, p_mean_rest, p_second, p_second_rest, p_x, p_label, p_positions,
    B, T, D, stride_b, stride_t, stride_positions, stride_class, stride_position, BLOCK: tl.constexpr,
):  # fmt: skip
    """mean and, where there is one, second of class and position; see ``portable.update``."""
    o_d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    o_p = tl.program_id(1)
    c = tl.program_id(2)
    m = o_d < D
    b_sum = tl.zeros([BLOCK], tl.float64)
    n = 0
    for b in range(B):
        if tl.load(p_label + b) == c:
            b_sum += features_of(p_x, p_positions, b, o_p, o_d, m, T, stride_b, stride_t, stride_positions)
            n += 1
    if n > 0:
        o = c.to(tl.int64) * stride_class + o_p * stride_position + o_d
        before = tl.load(p_count + c).to(tl.float64)
        share = n / (before + n)
        b_ours = b_sum / n
        b_mean = exact(p_mean, p_mean_rest, o, m)
        b_delta = b_ours - b_mean
        keep(b_mean + b_delta * share, p_mean, p_mean_rest, o, m)
        if p_second is not None:
            b_spread = b_delta * b_delta * (before * share)
            for b in range(B):
                if tl.load(p_label + b) == c:
                    b_x = features_of(p_x, p_positions, b, o_p, o_d, m, T, stride_b, stride_t, stride_positions)
                    b_spread += (b_x - b_ours) * (b_x - b_ours)
            keep(exact(p_second, p_second_rest, o, m) + b_spread, p_second, p_second_rest, o, m)


@on_device
def update(
    count: Tensor,
    mean: Tensor,
    mean_rest: Tensor | None,
    second: Tensor | None,
    second_rest: Tensor | None,
    x: Tensor,
    label: Tensor,
    positions: Tensor,
) -> None:
    """See ``portable.update``."""
    samples, tokens, width = x.shape
    classes, places, _ = mean.shape
    moments_kernel[(triton.cdiv(width, BLOCK), places, classes)](
        count, mean, mean_rest, second, second_rest, x, label, positions, samples, tokens, width,
        x.stride(0), x.stride(1), positions.stride(0) if positions.dim() == 2 else 0,
        mean.stride(0), mean.stride(1), BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    count += (label[:, None] == torch.arange(classes, device=label.device)).sum(0)
