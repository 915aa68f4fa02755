# mypy: disallow-untyped-defs=False
# (the arguments of a kernel are pointers and scalars of Triton's own; only constexprs can be annotated)
"""The scan over the columns, through pointers: any GPU."""

from __future__ import annotations

from typing import NamedTuple

import triton.language as tl
from torch import Tensor

import triton
from fastguard.ops.lm_head_stats.triton.pieces import NEGATIVE, OCTAVE, THRESHOLDS, logits

WAVES = 4
"""A scan is at most so many rounds of programs: within a part the rest lse grows."""


class Parts(NamedTuple):
    """What the scan writes of each part of V, over v != target, and ``combine_kernel`` adds up.

    maximum, total, moment [S, N]: the running maximum m, sum exp(z - m) and sum exp(z - m) z; dropped
    [S, N, THRESHOLDS]: the part of the sum in columns below each threshold. moment and
    dropped are None where nobody asks for the mean logit and for live columns.
    """

    maximum: Tensor
    total: Tensor
    moment: Tensor | None
    dropped: Tensor | None


@triton.jit
def product2(
    p_a, p_b, p_c, D, A_BLOCK: tl.constexpr, B_BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A @ B^T and A @ C^T, A loaded once: the traffic of one product twice as wide, in two sets of registers."""
    b_ab = tl.zeros([A_BLOCK, B_BLOCK], dtype=tl.float32)
    b_ac = tl.zeros([A_BLOCK, B_BLOCK], dtype=tl.float32)
    o_k = tl.arange(0, BLOCK_K)
    for k in range(0, D, BLOCK_K):
        if EVEN:
            b_a = tl.load(p_a[:, None] + (k + o_k)[None, :])
            b_b = tl.load(p_b[:, None] + (k + o_k)[None, :])
            b_c = tl.load(p_c[:, None] + (k + o_k)[None, :])
        else:
            m_k = (k + o_k)[None, :] < D
            b_a = tl.load(p_a[:, None] + (k + o_k)[None, :], mask=m_k, other=0.0)
            b_b = tl.load(p_b[:, None] + (k + o_k)[None, :], mask=m_k, other=0.0)
            b_c = tl.load(p_c[:, None] + (k + o_k)[None, :], mask=m_k, other=0.0)
        b_ab = tl.dot(b_a, tl.trans(b_b), b_ab, input_precision=PRECISION)
        b_ac = tl.dot(b_a, tl.trans(b_c), b_ac, input_precision=PRECISION)
    return b_ab, b_ac


@triton.jit
def fold(
    state, b_z, o_v, p_target, p_target_logit, m_n, p_bias, p_columns, V, scale, softcap, log_v, top,
    WITH_MEAN: tl.constexpr, MASS: tl.constexpr,
):  # fmt: skip
    """Take the raw products b_z of the columns o_v into a tile's running statistics; write their codes.

    state: the maximum m, sum exp(z - m) and sum exp(z - m) z [TILE], and the parts of the sum in columns whose codes
    are below ``top``, an octave below it and so on [TILE, THRESHOLDS], of masses rounded to MASS.
    """
    b_max, b_sum, b_moment, b_drop = state
    m_v = o_v < V
    b_bias = tl.load(p_bias + o_v, mask=m_v, other=0.0).to(tl.float32)[None, :] if p_bias is not None else 0.0
    b_z = logits(b_z, b_bias, scale, softcap)
    b_target = tl.load(p_target, mask=m_n, other=0).to(tl.int32)
    # Twice as low as the lowest maximum: an absent column has no mass even where nothing else has any.
    b_z = tl.where(m_v[None, :] & (o_v[None, :] != b_target[:, None]), b_z, 2 * NEGATIVE)
    b_new = tl.maximum(b_max, tl.max(b_z, 1))
    b_shrink = tl.exp(b_max - b_new)
    b_e = tl.exp(b_z - b_new[:, None])
    b_sum = b_sum * b_shrink + tl.sum(b_e, 1)
    if WITH_MEAN:
        b_moment = b_moment * b_shrink + tl.sum(b_e * b_z, 1)
    if p_columns is not None:
        b_rest = tl.maximum(b_sum, 1.0)
        if WITH_MEAN:
            # mean_logit weighs a column by |1 + z - mean|; lse - log V <= mean <= max bounds it.
            b_above = 1.0 + log_v + b_z - (b_new + tl.log(b_rest))[:, None]
            b_target_logit = tl.load(p_target_logit, mask=m_n, other=0.0)
            b_below = tl.maximum(b_new, b_target_logit)[:, None] - b_z
            b_e = b_e * tl.maximum(tl.maximum(b_above, b_below), 1.0)
        b_code = encode(tl.max(b_e * tl.where(m_n, 1.0 / b_rest, 0.0)[:, None], 0))  # a row of NaN asks for nothing
        tl.store(p_columns + o_v, b_code.to(tl.uint8), mask=m_v)
        b_under = b_code[:, None] < top - OCTAVE * tl.arange(0, THRESHOLDS)[None, :]
        b_drop = tl.dot(b_e.to(MASS), b_under.to(MASS), b_drop * b_shrink[:, None], input_precision="ieee")
    return b_new, b_sum, b_moment, b_drop


@triton.jit
def encode(b_mass):
    """Column code of a mass: exponent and two bits of mantissa, a logarithm in quarter octaves good to 9%."""
    b_bits = (b_mass.to(tl.int32, bitcast=True) + (1 << 20)) >> 21
    return tl.minimum(tl.maximum(b_bits - 127 * OCTAVE + 254, 0), 254)


@triton.jit
def store_part(p_parts, state, i_part, o_n, m_n, N):
    """Write what `fold` made of one part of V for the rows o_n of a tile."""
    b_max, b_sum, b_moment, b_drop = state
    o_part = i_part.to(tl.int64) * N + o_n
    tl.store(p_parts.maximum + o_part, b_max, mask=m_n)
    tl.store(p_parts.total + o_part, b_sum, mask=m_n)
    if p_parts.moment is not None:
        tl.store(p_parts.moment + o_part, b_moment, mask=m_n)
    if p_parts.dropped is not None:
        o_drop = o_part[:, None] * THRESHOLDS + tl.arange(0, THRESHOLDS)[None, :]
        tl.store(p_parts.dropped + o_drop, b_drop, mask=m_n[:, None])


@triton.jit
def scan_kernel(
    p_x, p_weight, p_bias, p_target, p_target_logit, p_bound, p_columns, p_parts,
    N, V, D, stride_columns, n_blocks, scale, softcap, log_v, top,
    TILE: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    MASS: tl.constexpr,
):  # fmt: skip
    """Partial statistics of one tile over ``n_blocks`` blocks of 2 BLOCK_V columns.

    parts: `Parts`, over v != target. columns: codes [T, V] of each column's largest mass in the tile, relative to the
    rest lse as known when it was read.
    """
    i_tile, i_part = tl.program_id(0), tl.program_id(1)
    o_n = i_tile * TILE + tl.arange(0, TILE)
    m_n = o_n < N
    p_rows = p_x + tl.minimum(o_n, N - 1).to(tl.int64) * D
    # The maximum starts at a lower bound of the rest lse: 1 <= sum wherever it was raised since.
    if p_bound is not None:
        b_max = tl.load(p_bound + o_n, mask=m_n, other=0.0)
    else:
        b_max = tl.full([TILE], NEGATIVE, tl.float32)
    b_none = tl.zeros([TILE], dtype=tl.float32)
    state = b_max, b_none, b_none, tl.zeros([TILE, THRESHOLDS], dtype=tl.float32)
    if p_columns is not None:
        p_columns += i_tile.to(tl.int64) * stride_columns
    for i_block in range(i_part * n_blocks, tl.minimum((i_part + 1) * n_blocks, tl.cdiv(V, 2 * BLOCK_V))):
        o_v = i_block * 2 * BLOCK_V + tl.arange(0, BLOCK_V)
        p_left = p_weight + tl.minimum(o_v, V - 1).to(tl.int64) * D
        p_right = p_weight + tl.minimum(o_v + BLOCK_V, V - 1).to(tl.int64) * D
        b_left, b_right = product2(p_rows, p_left, p_right, D, TILE, BLOCK_V, BLOCK_K, EVEN, PRECISION)
        for i_half in tl.static_range(2):
            state = fold(
                state, b_left if i_half == 0 else b_right, o_v + i_half * BLOCK_V, p_target + o_n, p_target_logit + o_n,
                m_n, p_bias, p_columns, V, scale, softcap, log_v, top, p_parts.moment is not None, MASS,
            )  # fmt: skip
    store_part(p_parts, state, i_part, o_n, m_n, N)


def _parts(tiles: int, n_blocks: int, processors: int) -> int:
    """Parts of V that finish the scan soonest: waves of programs times blocks a program, then the fewest parts."""

    def cost(parts: int) -> tuple[int, int]:
        return triton.cdiv(tiles * parts, processors) * triton.cdiv(n_blocks, parts), parts

    return min(range(1, min(n_blocks, max(WAVES * processors // tiles, 1)) + 1), key=cost)
