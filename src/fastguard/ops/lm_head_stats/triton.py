# mypy: disallow-untyped-defs=False
# (the arguments of a kernel are pointers and scalars of Triton's own; only constexprs can be annotated)
"""``lm_head_stats`` on GPUs, in Triton; float64 inputs are handed to ``portable.py`` (no tensor cores to gain).

Forward, one pass over the logits (2 N D V flops) and no logits in memory:

1. ``target_kernel``: the target logit of each row;
2. ``scan_kernel``: a program owns (one tile of TILE rows, one part of V). It keeps a running maximum and sums per
   row, and writes a byte per (tile, column), the code of the column's peak: its largest mass in the tile. Masses are
   relative to the running rest lse, which only grows. The run starts from the rest lse over SAMPLE columns, half of
   them the first (tokenizers number their merges by frequency), half evenly spaced; parts of V start alike from it;
3. ``combine_kernel``: sums over the parts, in order (no atomics). The scan also summed what each row would lose at each
   threshold of the ladder (`live.py`), to the columns whose code is below it: a product with 16 columns of zeros
   and ones, so that the ladder costs no more than the reading of it. The promise is settled here;
4. ``mark_kernel``: gives the columns at or above the threshold the code LIVE.

Backward over the live columns (6 N D C flops), or over all of them in windows:

1. ``compact_kernel``: column codes -> list of live columns per tile, and each column's place in the list;
2. ``dlogit_kernel``: logits of the listed columns, rows of W gathered by index inside the product; writes the
   gradient at the raw products, transposed [C, TILE], and each row's kept mass, from which the tail follows;
3. ``dx_kernel``: dX = dlogit @ W[list] + tail * (mean row of the heaviest dropped columns, `warm_columns`);
4. ``dweight_kernel``: a program owns a block of columns and loops over the tiles in which any of them is live, so
   that dW is read and written once, without atomics. Columns are ordered by the tiles that want them.

One host synchronisation per backward: the largest number of live columns sizes the buffers.
Products run in the input dtype with fp32 accumulation; float32 products are exact ("ieee") unless
``torch.set_float32_matmul_precision`` allows TF32.

Prefixes: p_ pointer, i_ index of a program or step, o_ offsets, m_ mask, b_ block of values, n_ count.
A pointer (or soft-cap) that is None is absent: a kernel is compiled for what it is given. Some arguments are tuples of
pointers, which go together as they do in ``op.py``.
Shapes: N rows, V vocabulary, D hidden size, T tiles, S parts of V, C places in a list of live columns, W columns
of a window, U columns live in any tile.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

import triton
from fastguard.ops.launch import on_device, precision, processors, shared_memory
from fastguard.ops.lm_head_stats import live, portable
from fastguard.ops.lm_head_stats.op import TILE, Grads, Row, Saved
from fastguard.ops.lm_head_stats.portable import keep, read_kept
from fastguard.ops.vocabulary import Head

__all__ = ["backward", "forward", "keep", "read_kept"]

SAMPLE = 2048
"""Columns that give the scan its starting point; used from 8 times as many columns on (1.6% of V = 128256)."""

WAVES = 4
"""A scan is at most so many rounds of programs: within a part the rest lse grows."""

ROUNDING = 1 - 2.0**-8
"""What sums of bf16 masses keep of the true sums, at least."""

WINDOW_ELEMENTS = 2**26
"""Most elements of dlogits alive at a time: 128 MB in bf16."""

NEGATIVE = tl.constexpr(-1.0e30)
FAR = tl.constexpr(-1.0e15)  # its square is finite
LIVE = tl.constexpr(live.LIVE)
OCTAVE = tl.constexpr(live.CODES_PER_OCTAVE)
THRESHOLDS = tl.constexpr(live.THRESHOLDS)


class Blocks(NamedTuple):
    """Shape of a matrix kernel's program: outer and inner block, warps, pipeline stages."""

    outer: int
    inner: int
    warps: int
    stages: int


class Config(NamedTuple):
    """Block shapes of the four matrix kernels; TILE rows are the other side of each."""

    scan: Blocks  # columns (twice: see product2), D
    dlogit: Blocks  # columns, D
    dx: Blocks  # D, columns
    dweight: Blocks  # D, rows; also COLUMNS columns


COLUMNS = 128
"""Columns that one program of ``dweight_kernel`` owns, and the granularity of lists of live columns."""


def config(dtype: torch.dtype, shared: int) -> Config:
    """Block shapes for a dtype and a device with ``shared`` bytes of shared memory per program."""
    if dtype == torch.float32:
        small = Blocks(64, 32, 8, 2)
        return Config(small, small, small, small)
    square = Blocks(128, 64, 8, 4)
    # Lists of columns are read through an index, which takes the pipeline two more stages to run as deep.
    if shared >= 200 * 1024:  # Hopper, Blackwell
        return Config(scan=square, dlogit=square, dx=Blocks(256, 64, 8, 5), dweight=Blocks(256, 64, 8, 5))
    if shared >= 144 * 1024:  # A100
        listed = Blocks(128, 64, 8, 6)
        return Config(scan=Blocks(64, 64, 8, 4), dlogit=square, dx=listed, dweight=listed)
    narrow = Blocks(128, 32, 8, 2)
    return Config(scan=Blocks(64, 32, 8, 2), dlogit=narrow, dx=narrow, dweight=narrow)


@triton.jit
def logits(b_z, b_bias, scale, softcap):
    """Softcap(scale * (z + bias)); tanh by its series near 0, where the exponential form would cancel."""
    b_z = (b_z + b_bias) * scale
    if softcap is not None:
        b_y = b_z / softcap
        b_e = tl.exp(-2.0 * tl.abs(b_y))
        b_far = tl.where(b_y < 0, -1.0, 1.0) * (1.0 - b_e) / (1.0 + b_e)
        b_q = b_y * b_y
        b_near = b_y * (1.0 + b_q * (-1.0 / 3 + b_q * (2.0 / 15 + b_q * (-17.0 / 315))))
        b_z = softcap * tl.where(tl.abs(b_y) < 0.25, b_near, b_far)
    return b_z


@triton.jit
def product(
    p_a, p_b, D, A_BLOCK: tl.constexpr, B_BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A @ B^T in fp32 of two blocks of rows with D features; p_a [A_BLOCK], p_b [B_BLOCK] point at row starts."""
    b_acc = tl.zeros([A_BLOCK, B_BLOCK], dtype=tl.float32)
    o_k = tl.arange(0, BLOCK_K)
    for k in range(0, D, BLOCK_K):
        if EVEN:
            b_a = tl.load(p_a[:, None] + (k + o_k)[None, :])
            b_b = tl.load(p_b[:, None] + (k + o_k)[None, :])
        else:
            m_k = (k + o_k)[None, :] < D
            b_a = tl.load(p_a[:, None] + (k + o_k)[None, :], mask=m_k, other=0.0)
            b_b = tl.load(p_b[:, None] + (k + o_k)[None, :], mask=m_k, other=0.0)
        b_acc = tl.dot(b_a, tl.trans(b_b), b_acc, input_precision=PRECISION)
    return b_acc


@triton.jit
def target_kernel(
    p_x, p_weight, p_bias, p_target, p_out, N, D, scale, softcap, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Target logit of each row: out [N]."""
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    b_target = tl.load(p_target + o_n, mask=m_n, other=0)
    o_k = tl.arange(0, BLOCK_K)
    b_z = tl.zeros([BLOCK_N], dtype=tl.float32)
    for k in range(0, D, BLOCK_K):
        m = m_n[:, None] & ((k + o_k)[None, :] < D)
        b_x = tl.load(p_x + o_n.to(tl.int64)[:, None] * D + (k + o_k)[None, :], mask=m, other=0.0)
        b_w = tl.load(p_weight + b_target[:, None] * D + (k + o_k)[None, :], mask=m, other=0.0)
        b_z += tl.sum(b_x.to(tl.float32) * b_w.to(tl.float32), 1)
    b_bias = tl.load(p_bias + b_target, mask=m_n, other=0.0).to(tl.float32) if p_bias is not None else 0.0
    tl.store(p_out + o_n, logits(b_z, b_bias, scale, softcap), mask=m_n)


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


@triton.jit
def combine_kernel(
    p_parts, p_target, p_target_logit, p_lse, p_rest, p_mean, p_least, p_columns, N, stride_columns, n_parts,
    filter_tol, top, TILE: tl.constexpr,
):  # fmt: skip
    """Sum the parts of one tile: lse, rest, mean [N]; least [T]: the code that columns live from. Marks the targets."""
    i_tile = tl.program_id(0)
    o_n = i_tile * TILE + tl.arange(0, TILE)
    m_n = o_n < N
    b_max = tl.full([TILE], NEGATIVE, tl.float32)
    b_sum = tl.zeros([TILE], dtype=tl.float32)
    b_moment = tl.zeros([TILE], dtype=tl.float32)
    b_drop = tl.zeros([TILE, THRESHOLDS], dtype=tl.float32)
    o_k = tl.arange(0, THRESHOLDS)
    o_part = o_n.to(tl.int64)
    for _ in range(n_parts):
        b_part = tl.load(p_parts.maximum + o_part, mask=m_n, other=0.0)
        b_new = tl.maximum(b_max, b_part)
        b_old, b_part = tl.exp(b_max - b_new), tl.exp(b_part - b_new)
        b_max = b_new
        b_sum = b_sum * b_old + b_part * tl.load(p_parts.total + o_part, mask=m_n, other=0.0)
        if p_parts.moment is not None:
            b_moment = b_moment * b_old + b_part * tl.load(p_parts.moment + o_part, mask=m_n, other=0.0)
        if p_parts.dropped is not None:
            p_drop = p_parts.dropped + o_part[:, None] * THRESHOLDS + o_k[None, :]
            b_drop = b_drop * b_old[:, None] + b_part[:, None] * tl.load(p_drop, mask=m_n[:, None], other=0.0)
        o_part += N
    b_target_logit = tl.load(p_target_logit + o_n, mask=m_n, other=0.0)
    b_rest = b_max + tl.log(b_sum)
    b_top = tl.maximum(b_rest, b_target_logit)
    b_lse = b_top + tl.log(tl.exp(b_rest - b_top) + tl.exp(b_target_logit - b_top))
    tl.store(p_lse + o_n, b_lse, mask=m_n)
    tl.store(p_rest + o_n, b_rest, mask=m_n)
    b_floor = tl.maximum(b_sum, 1e-30)
    if p_parts.moment is not None:
        b_mean = tl.exp(b_rest - b_lse) * b_moment / b_floor + tl.exp(b_target_logit - b_lse) * b_target_logit
        tl.store(p_mean + o_n, b_mean, mask=m_n)
    if p_parts.dropped is not None:
        m_over = m_n[:, None] & (b_drop > (filter_tol * b_floor)[:, None])  # not of NaN
        b_over = tl.max(m_over.to(tl.int32), 0)
        i_step = tl.min(tl.where(b_over == 0, o_k, THRESHOLDS), 0)
        tl.store(p_least + i_tile, tl.where(i_step < THRESHOLDS, tl.maximum(top - OCTAVE * i_step, 0), 0))
        b_target = tl.load(p_target + o_n, mask=m_n, other=0)
        p_marked = p_columns + i_tile.to(tl.int64) * stride_columns + b_target
        tl.store(p_marked, tl.full([TILE], LIVE, tl.int32).to(tl.uint8), mask=m_n)


@triton.jit
def mark_kernel(p_columns, p_least, V, stride_columns, BLOCK: tl.constexpr):
    """Give the columns of a tile whose code is at least the tile's the code LIVE, in place."""
    i_tile = tl.program_id(0)
    o_v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_v = o_v < V
    p_code = p_columns + i_tile.to(tl.int64) * stride_columns + o_v
    m_live = m_v & (tl.load(p_code, mask=m_v, other=0).to(tl.int32) >= tl.load(p_least + i_tile))
    tl.store(p_code, tl.full([BLOCK], LIVE, tl.int32).to(tl.uint8), mask=m_live)


@triton.jit
def compact_kernel(p_codes, p_index, p_place, p_count, stride, n_columns, n_places, first, BLOCK: tl.constexpr):
    """List the columns of one row of codes that equal LIVE.

    codes [T, stride] of which n_columns are read; index [T, n_places]: first + column, ascending;
    place [T, n_columns]: position in the list, -1 for none; count [T].
    """
    i_row = tl.program_id(0)
    o = tl.arange(0, BLOCK)
    n = 0
    for start in range(0, n_columns, BLOCK):
        m = start + o < n_columns
        b_live = (tl.load(p_codes + i_row.to(tl.int64) * stride + start + o, mask=m, other=0) == LIVE).to(tl.int32)
        b_place = n + tl.cumsum(b_live, 0) - 1
        tl.store(p_place + i_row.to(tl.int64) * n_columns + start + o, tl.where(b_live > 0, b_place, -1), mask=m)
        m_live = (b_live > 0) & (b_place < n_places)
        tl.store(p_index + i_row.to(tl.int64) * n_places + b_place, first + start + o, mask=m_live)
        n += tl.sum(b_live, 0)
    tl.store(p_count + i_row, n)


@triton.jit
def dlogit_kernel(
    p_grads, p_x, p_weight, p_bias, p_target, p_saved, p_index, p_count, p_dlogit, p_kept, p_kept_mean,
    N, D, n_places, stride_index, scale, softcap,
    TILE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient at the raw products of the listed columns of one tile: dlogit [T, n_places, TILE].

    grads: `Grads`; saved: `Saved`. kept, kept_mean [blocks, N]: per block of places, each row's sum of
    exp(z - rest_lse) over v != target and of p (1 + z - mean_logit).
    """
    i_tile, i_block = tl.program_id(0), tl.program_id(1)
    n_listed = tl.load(p_count + i_tile)
    if i_block * BLOCK_C >= n_listed:
        return
    o_c = i_block * BLOCK_C + tl.arange(0, BLOCK_C)
    o_n = i_tile * TILE + tl.arange(0, TILE)
    m_n = o_n < N
    b_index = tl.load(p_index + i_tile.to(tl.int64) * stride_index + o_c, mask=o_c < n_listed, other=-1)
    b_column = tl.maximum(b_index, 0)
    p_listed = p_weight + b_column.to(tl.int64) * D
    p_rows = p_x + tl.minimum(o_n, N - 1).to(tl.int64) * D
    b_z = product(p_listed, p_rows, D, BLOCK_C, TILE, BLOCK_K, EVEN, PRECISION)
    b_bias = tl.load(p_bias + b_column).to(tl.float32)[:, None] if p_bias is not None else 0.0
    # Places beyond the list and rows beyond the last have no mass and no target.
    b_z = tl.where(b_index[:, None] >= 0, logits(b_z, b_bias, scale, softcap), FAR)
    m_target = b_index[:, None] == tl.load(p_target + o_n, mask=m_n, other=-2).to(tl.int32)[None, :]
    b_d = tl.zeros([BLOCK_C, TILE], dtype=tl.float32)
    if p_grads.lse is not None or p_grads.mean_logit is not None:
        b_p = tl.exp(b_z - tl.load(p_saved.lse + o_n, mask=m_n, other=float("inf"))[None, :])
    if p_grads.lse is not None:
        b_d += b_p * tl.load(p_grads.lse + o_n, mask=m_n, other=0.0)[None, :]
    if p_grads.mean_logit is not None:
        b_m = b_p * (1.0 + b_z - tl.load(p_saved.mean_logit + o_n, mask=m_n, other=0.0)[None, :])
        b_d += b_m * tl.load(p_grads.mean_logit + o_n, mask=m_n, other=0.0)[None, :]
        if p_kept_mean is not None:
            tl.store(p_kept_mean + i_block.to(tl.int64) * N + o_n, tl.sum(b_m, 0), mask=m_n)
    if p_grads.rest_lse is not None or p_kept is not None:
        b_rest = tl.exp(b_z - tl.load(p_saved.rest_lse + o_n, mask=m_n, other=float("inf"))[None, :])
        b_rest = tl.where(m_target, 0.0, b_rest)
        if p_kept is not None:
            tl.store(p_kept + i_block.to(tl.int64) * N + o_n, tl.sum(b_rest, 0), mask=m_n)
    if p_grads.rest_lse is not None:
        b_d += b_rest * tl.load(p_grads.rest_lse + o_n, mask=m_n, other=0.0)[None, :]
    if p_grads.target_logit is not None:
        b_d += tl.where(m_target, tl.load(p_grads.target_logit + o_n, mask=m_n, other=0.0)[None, :], 0.0)
    if softcap is not None:
        b_y = b_z / softcap
        b_d *= 1.0 - b_y * b_y
    b_d *= scale
    p_out = p_dlogit + (i_tile.to(tl.int64) * n_places + i_block * BLOCK_C) * TILE
    o_out = tl.arange(0, BLOCK_C)[:, None] * TILE + tl.arange(0, TILE)[None, :]
    tl.store(p_out + o_out, b_d.to(p_dlogit.dtype.element_ty))


@triton.jit
def dx_kernel(
    p_dlogit, p_weight, p_index, p_count, p_tail, p_tail_row, p_dx, N, D, n_places, stride_index,
    TILE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx [N, D] = dlogit^T @ weight[index] (+ tail [N] times the tile's tail_row [T, D]); ADD adds to dx."""
    i_tile, i_d = tl.program_id(0), tl.program_id(1)
    n_listed = tl.load(p_count + i_tile)
    o_t = tl.arange(0, TILE)
    o_n = i_tile * TILE + o_t
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    m = (o_n < N)[:, None] & m_d[None, :]
    p_out = p_dx + o_n.to(tl.int64)[:, None] * D + o_d[None, :]
    b_acc = tl.load(p_out, mask=m, other=0.0) if ADD else tl.zeros([TILE, BLOCK_D], dtype=tl.float32)
    if p_tail is not None:
        b_tail = tl.load(p_tail + o_n, mask=o_n < N, other=0.0)
        b_row = tl.load(p_tail_row + i_tile.to(tl.int64) * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_acc += b_tail[:, None] * b_row[None, :]
    p_list = p_index + i_tile.to(tl.int64) * stride_index
    p_block = p_dlogit + i_tile.to(tl.int64) * n_places * TILE
    for c in range(0, n_listed, BLOCK_C):
        o_c = c + tl.arange(0, BLOCK_C)
        b_index = tl.load(p_list + o_c, mask=o_c < n_listed, other=0).to(tl.int64)
        b_w = tl.load(p_weight + b_index[:, None] * D + o_d[None, :], mask=m_d[None, :], other=0.0)
        b_d = tl.load(p_block + o_c[:, None] * TILE + o_t[None, :])
        b_acc = tl.dot(tl.trans(b_d), b_w, b_acc, input_precision=PRECISION)
    tl.store(p_out, b_acc, mask=m)


@triton.jit
def dweight_kernel(
    p_dlogit, p_x, p_column, p_slot, p_tile, p_n_tiles, p_dweight, p_dbias, N, D, n_places, n_columns, n_tiles,
    stride_slot, stride_tile,
    TILE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dweight[column] += dlogit @ x and dbias[column] += dlogit summed over rows, for a block of columns.

    column [n_columns]: the columns of W in the order of the blocks; slot [T, n_columns]: where each stands in the
    list of a tile, -1 for nowhere; tile [blocks, T], n_tiles [blocks]: the tiles in which a block has anything.
    """
    i_block, i_d = tl.program_id(0), tl.program_id(1)
    n_steps = tl.load(p_n_tiles + i_block) * (TILE // BLOCK_N)
    if n_steps == 0:
        return
    o_c = i_block * COLUMNS + tl.arange(0, COLUMNS)
    m_c = o_c < n_columns
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    o_t = tl.arange(0, BLOCK_N)
    b_column = tl.load(p_column + o_c, mask=m_c, other=0).to(tl.int64)
    if p_dweight is not None:
        m = m_c[:, None] & m_d[None, :]
        p_out = p_dweight + b_column[:, None] * D + o_d[None, :]
        b_acc = tl.load(p_out, mask=m, other=0.0)
    b_sum = tl.zeros([COLUMNS], dtype=tl.float32)
    for i_step in range(n_steps):
        i_tile = tl.load(p_tile + i_block.to(tl.int64) * stride_tile + i_step // (TILE // BLOCK_N))
        o_row = (i_step % (TILE // BLOCK_N)) * BLOCK_N + o_t
        b_slot = tl.load(p_slot + i_tile.to(tl.int64) * stride_slot + o_c, mask=m_c, other=-1)
        p_lists = p_dlogit + i_tile.to(tl.int64) * n_places * TILE
        b_d = tl.load(p_lists + b_slot[:, None] * TILE + o_row[None, :], mask=(b_slot >= 0)[:, None], other=0.0)
        if p_dbias is not None:
            b_sum += tl.sum(b_d.to(tl.float32), 1)
        if p_dweight is not None:
            o_x = tl.minimum(o_row, N - 1 - i_tile * TILE)  # dlogit is 0 beyond the last row
            p_rows = p_x + i_tile.to(tl.int64) * TILE * D
            b_x = tl.load(p_rows + o_x[:, None] * D + o_d[None, :], mask=m_d[None, :], other=0.0)
            b_acc = tl.dot(b_d, b_x, b_acc, input_precision=PRECISION)
    if p_dweight is not None:
        tl.store(p_out, b_acc, mask=m)
    if p_dbias is not None and i_d == 0:
        tl.store(p_dbias + b_column, tl.load(p_dbias + b_column, mask=m_c, other=0.0) + b_sum, mask=m_c)


@triton.jit
def tail_kernel(p_tail, p_x, p_out, N, D, TILE: tl.constexpr, BLOCK_D: tl.constexpr):
    """out [T, D] = sum over the rows of a tile of tail * x."""
    i_tile, i_d = tl.program_id(0), tl.program_id(1)
    o_n = i_tile * TILE + tl.arange(0, TILE)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m = (o_n < N)[:, None] & (o_d < D)[None, :]
    b_x = tl.load(p_x + o_n.to(tl.int64)[:, None] * D + o_d[None, :], mask=m, other=0.0).to(tl.float32)
    b_tail = tl.load(p_tail + o_n, mask=o_n < N, other=0.0)
    tl.store(p_out + i_tile.to(tl.int64) * D + o_d, tl.sum(b_tail[:, None] * b_x, 0), mask=o_d < D)


@triton.jit
def count_kernel(p_codes, p_counts, stride, n_columns, BLOCK: tl.constexpr):
    """counts [T, 256] int32: how often each code occurs in a row of codes."""
    i_row = tl.program_id(0)
    b_counts = tl.zeros([256], dtype=tl.int32)
    for start in range(0, n_columns, BLOCK):
        o = start + tl.arange(0, BLOCK)
        b_code = tl.load(p_codes + i_row.to(tl.int64) * stride + o, mask=o < n_columns, other=0)
        b_counts += tl.histogram(b_code.to(tl.int32), 256)  # absent ones as 0, which weighs nothing
    tl.store(p_counts + i_row * 256 + tl.arange(0, 256), b_counts)


@triton.jit
def weigh_kernel(p_codes, p_floor, p_weight, p_total, stride, n_columns, n_tiles, BLOCK: tl.constexpr):
    """total [n_columns]: over the tiles, weight [T] times the mass of a column dropped at floor [T] or more."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < n_columns
    b_total = tl.zeros([BLOCK], dtype=tl.float32)
    p_row = p_codes + o
    for i_tile in range(n_tiles):
        b_code = tl.load(p_row, mask=m, other=0).to(tl.int32)
        p_row += stride
        b_mass = tl.exp2((b_code - 254).to(tl.float32) / OCTAVE) * tl.load(p_weight + i_tile)
        b_total += tl.where((b_code >= tl.load(p_floor + i_tile)) & (b_code < LIVE), b_mass, 0.0)
    tl.store(p_total + o, b_total, mask=m)


@triton.jit
def order_kernel(p_place, p_key, n_columns, n_tiles, BLOCK: tl.constexpr):
    """key [n_columns] int32: sorts columns live in a quarter of the tiles first, the others by first and last tile."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < n_columns
    b_count = tl.zeros([BLOCK], dtype=tl.int32)
    b_first = tl.full([BLOCK], 0, tl.int32) + n_tiles
    b_last = tl.zeros([BLOCK], dtype=tl.int32)
    p_row = p_place + o
    for i_tile in range(n_tiles):
        m_live = tl.load(p_row, mask=m, other=-1) >= 0
        p_row += n_columns
        b_count += m_live.to(tl.int32)
        b_first = tl.where(m_live, tl.minimum(b_first, i_tile), b_first)
        b_last = tl.where(m_live, i_tile, b_last)
    b_key = tl.where(4 * b_count >= n_tiles, 0, 1 + b_first * n_tiles + b_last)
    tl.store(p_key + o, b_key, mask=m)


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


class Window(NamedTuple):
    """Live columns of every tile within a range of columns of W.

    listed [T, C]: columns of W; n_listed [T]; column [U]: columns of W in the order in which dW is computed;
    slot [T, U]: their places in ``listed``, -1 for none; tile [blocks, T], n_tiles [blocks]: tiles per block.
    """

    listed: Tensor
    n_listed: Tensor
    column: Tensor
    slot: Tensor
    tile: Tensor
    n_tiles: Tensor


@on_device
def forward(x: Tensor, head: Head, target: Tensor, filter_tol: float, with_mean: bool, columns: Tensor) -> Row:
    """The statistics of x [N, D], each [N]; fills ``columns`` [T, V] unless empty.

    Without ``with_mean`` mean_logit is zeros. Signature and meaning of ``portable.forward``.
    """
    if x.dtype == torch.float64:
        return portable.forward(x, head, target, filter_tol, with_mean, columns)
    x, head = x.contiguous(), replace(head, weight=head.weight.contiguous())
    (n, d), v = x.shape, head.weight.shape[0]
    target_logit = torch.empty(n, dtype=torch.float32, device=x.device)
    if n:
        target_kernel[triton.cdiv(n, 16),](
            x, head.weight, head.bias, target, target_logit, n, d, head.scale, head.softcap, BLOCK_N=16, BLOCK_K=128
        )
    record = columns.numel() > 0
    bound = _bound(x, head, target, target_logit) if record and v >= 8 * SAMPLE else None
    lse, rest_lse, mean = _scan(
        x, head, target, target_logit, filter_tol, with_mean, bound, columns if record else None
    )
    return Row(lse, rest_lse, target_logit, mean)


def _bound(x: Tensor, head: Head, target: Tensor, target_logit: Tensor) -> Tensor:
    """The rest lse [N] over a sample of the columns."""
    v = head.weight.shape[0]
    sample = live.sample(v, SAMPLE, x.device)
    place = torch.full((v,), -1, device=x.device).index_copy_(0, sample, torch.arange(SAMPLE, device=x.device))
    bias = None if head.bias is None else head.bias[sample]
    return _scan(x, replace(head, weight=head.weight[sample], bias=bias), place[target], target_logit)[1]


def _scan(
    x: Tensor,
    head: Head,
    target: Tensor,
    target_logit: Tensor,
    filter_tol: float = 0.0,
    with_mean: bool = False,
    bound: Tensor | None = None,
    columns: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(lse, rest_lse, mean_logit) over the columns of the head, from ``bound`` [N] <= rest_lse; fills ``columns``."""
    from fastguard.ops.lm_head_stats import hopper  # which is made of this file's functions

    (n, d), v = x.shape, head.weight.shape[0]
    tiles = triton.cdiv(n, TILE)
    by_descriptors = hopper.serves(x, head)
    if by_descriptors:
        blocks = hopper.blocks_of(head, with_mean)
        n_blocks, parts_of = triton.cdiv(v, blocks.outer), hopper.parts_of
    else:
        blocks = config(x.dtype, shared_memory(x.device)).scan
        n_blocks, parts_of = triton.cdiv(v, 2 * blocks.outer), _parts
    n_parts = parts_of(tiles, n_blocks, processors(x.device)) if n else 1
    per_part = triton.cdiv(n_blocks, n_parts)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    lse, rest_lse, mean = empty(n), empty(n), torch.zeros(n, dtype=torch.float32, device=x.device)
    record = columns is not None
    moment, dropped = empty(n_parts, n) if with_mean else None, empty(n_parts, n, THRESHOLDS.value) if record else None
    parts = Parts(empty(n_parts, n), empty(n_parts, n), moment, dropped)
    least = empty(tiles, dtype=torch.int32) if record else None
    if not n:
        return lse, rest_lse, mean
    stride = 0 if columns is None else columns.stride(0)
    top = 254 + live.CODES_PER_OCTAVE * live.first_octave(filter_tol) if record else 0
    if by_descriptors:
        hopper.scan(x, head, target, target_logit, bound, columns, parts, per_part, top)
    else:
        scan_kernel[tiles, n_parts](
            x, head.weight, head.bias, target, target_logit, bound, columns, parts,
            n, v, d, stride, per_part, head.scale, head.softcap, math.log(v), top,
            TILE=TILE, BLOCK_V=blocks.outer, BLOCK_K=blocks.inner, EVEN=d % blocks.inner == 0, PRECISION=precision(),
            MASS=tl.bfloat16 if x.device.type == "cuda" else tl.float32,  # the interpreter has no products of bfloat16
            num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
    combine_kernel[tiles,](
        parts, target, target_logit, lse, rest_lse, mean, least, columns, n, stride, n_parts,
        filter_tol * ROUNDING, top, TILE=TILE,
    )  # fmt: skip
    if record:
        mark_kernel[tiles, triton.cdiv(v, 4096)](columns, least, v, stride, BLOCK=4096)
    return lse, rest_lse, mean


@on_device
def backward(
    grads: Grads,
    x: Tensor,
    head: Head,
    target: Tensor,
    saved: Saved,
    columns: Tensor | None,
    need_hidden: bool,
    dweight: Tensor | None,
    dbias: Tensor | None,
) -> Tensor | None:
    """dx [N, D] in fp32 (None unless needed); adds to the fp32 buffers dweight [V, D] and dbias [V] if given.

    columns: [T, V] as the forward recorded them, or None for every column; the forward saw to it that they keep
    its ``filter_tol``. Signature and meaning of ``portable.backward``. dweight must be contiguous.
    """
    if x.dtype == torch.float64:
        return portable.backward(grads, x, head, target, saved, columns, need_hidden, dweight, dbias)
    if dweight is not None and not dweight.is_contiguous():
        raise ValueError(f"dweight: expected a contiguous tensor, got strides {dweight.stride()}")
    x, weight = x.contiguous(), head.weight.contiguous()
    (n, d), v = x.shape, weight.shape[0]
    dx = torch.empty(n, d, dtype=torch.float32, device=x.device) if need_hidden else None
    if not n:
        return dx
    tiles = triton.cdiv(n, TILE)
    blocks = config(x.dtype, shared_memory(x.device))
    need_weight = dweight is not None or dbias is not None
    warm = share = tail_row = None
    most = v
    if columns is not None:
        counts = torch.empty(tiles, 256, dtype=torch.int32, device=x.device)
        count_kernel[tiles,](columns, counts, columns.stride(0), v, BLOCK=2048)
        most = int(counts[:, live.LIVE].max())  # the host synchronisation
        warm, share = warm_columns(columns, counts, saved.rest_lse, head.softcap)
        tail_row = share.to(weight.dtype) @ weight[warm]
    tail = None

    widest = max(WINDOW_ELEMENTS // (tiles * TILE), COLUMNS)
    width = v if most <= widest else widest // COLUMNS * COLUMNS
    n_places = triton.cdiv(min(most, width), COLUMNS) * COLUMNS
    dlogit = torch.empty(tiles, n_places, TILE, dtype=x.dtype, device=x.device)
    places = n_places // blocks.dlogit.outer
    kept_rest = torch.zeros(n, dtype=torch.float32, device=x.device)
    kept_mean = torch.zeros_like(kept_rest)
    for first in range(0, v, width):
        last = first + width >= v
        window = _window(columns, first, min(first + width, v), tiles, n_places, need_weight, x.device)
        stride_index = window.listed.stride(0)
        kept = kept_m = None
        if columns is not None:
            kept, kept_m = torch.zeros(2, places, n, device=x.device).unbind()
        dlogit_kernel[tiles, places](
            grads, x, weight, head.bias, target, saved, window.listed, window.n_listed, dlogit, kept, kept_m,
            n, d, n_places, stride_index, head.scale, head.softcap,
            TILE=TILE, BLOCK_C=blocks.dlogit.outer, BLOCK_K=blocks.dlogit.inner, EVEN=d % blocks.dlogit.inner == 0,
            PRECISION=precision(), num_warps=blocks.dlogit.warps, num_stages=blocks.dlogit.stages,
        )  # fmt: skip
        if kept is not None and kept_m is not None:
            kept_rest += kept.sum(0)
            kept_mean += kept_m.sum(0)
            if last:
                tail = head.scale * _tail_mass(grads, saved, kept_rest, kept_mean)
        if dx is not None:
            dx_kernel[tiles, triton.cdiv(d, blocks.dx.outer)](
                dlogit, weight, window.listed, window.n_listed, tail, tail_row, dx, n, d, n_places, stride_index,
                TILE=TILE, BLOCK_D=blocks.dx.outer, BLOCK_C=blocks.dx.inner, ADD=first > 0,
                PRECISION=precision(),
                num_warps=blocks.dx.warps, num_stages=blocks.dx.stages,
            )  # fmt: skip
        if need_weight:
            outer = triton.cdiv(d, blocks.dweight.outer) if dweight is not None else 1
            dweight_kernel[window.n_tiles.shape[0], outer](
                dlogit, x, window.column, window.slot, window.tile, window.n_tiles, dweight, dbias,
                n, d, n_places, window.column.shape[0], tiles, window.slot.stride(0), window.tile.stride(0),
                TILE=TILE, COLUMNS=COLUMNS, BLOCK_D=blocks.dweight.outer, BLOCK_N=blocks.dweight.inner,
                PRECISION=precision(), num_warps=blocks.dweight.warps, num_stages=blocks.dweight.stages,
            )  # fmt: skip
    if tail is not None and warm is not None and share is not None:
        if dweight is not None:
            tail_x = torch.empty(tiles, d, dtype=torch.float32, device=x.device)
            tail_kernel[tiles, triton.cdiv(d, 64)](tail, x, tail_x, n, d, TILE=TILE, BLOCK_D=64)
            dweight.index_add_(0, warm, share.t() @ tail_x)
        if dbias is not None:
            tail_sum = torch.nn.functional.pad(tail, (0, tiles * TILE - n)).view(tiles, TILE).sum(1)
            dbias.index_add_(0, warm, tail_sum @ share)
    return dx


def warm_columns(columns: Tensor, counts: Tensor, rest_lse: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """(warm [K], share [T, K]): the dropped columns that stand for a tile's tail, of all tiles, and their weights.

    A tile's own are its heaviest, up to COVERAGE of its dropped mass; of all tiles' the WARM heaviest. What is none
    of a tile's weighs 0; the soft-cap's slope is in. counts [T, 256]: how often each code occurs.
    """
    mass = live.mass_of_codes(columns.device).float()
    heaviest_first = (counts * mass).flip(1).cumsum(1)
    floor = (255 - (heaviest_first < live.COVERAGE * heaviest_first[:, -1:]).sum(1, keepdim=True)).clamp_min(1)
    tiny = torch.finfo(torch.float32).tiny
    weight = 1 / heaviest_first.gather(1, 255 - floor).clamp_min(tiny)
    total = torch.empty(columns.shape[1], device=columns.device)
    weigh_kernel[triton.cdiv(len(total), 1024),](
        columns, floor.int(), weight, total, columns.stride(0), len(total), columns.shape[0], BLOCK=1024
    )
    warm = total.sort(descending=True, stable=True).indices[: live.WARM]
    picked = columns[:, warm]
    share = mass[picked.int()] * (picked >= floor)
    share = share / share.sum(1, keepdim=True).clamp_min(tiny)
    return warm, share * portable.slope_of_tiles(picked, rest_lse, softcap) if softcap else share


def _tail_mass(grads: Grads, saved: Saved, kept_rest: Tensor, kept_mean: Tensor) -> Tensor:
    """What the dropped columns add to each row's sum of dlogits before soft-cap and scale: [N]."""
    dropped = (1 - kept_rest).clamp_min(0.0)
    tail = torch.zeros_like(dropped)
    if grads.lse is not None:
        tail += grads.lse * torch.exp(saved.rest_lse - saved.lse) * dropped
    if grads.rest_lse is not None:
        tail += grads.rest_lse * dropped
    if grads.mean_logit is not None:
        tail += grads.mean_logit * (1 - kept_mean)
    return tail


def _window(
    columns: Tensor | None,
    first: int,
    end: int,
    tiles: int,
    n_places: int,
    need_weight: bool,
    device: torch.device,
) -> Window:
    """The live columns among [first, end), or all of them."""
    width = end - first
    n_blocks = triton.cdiv(width, COLUMNS)
    empty = torch.empty(0, 0, dtype=torch.int32, device=device)
    if columns is None:
        every = torch.arange(width, dtype=torch.int32, device=device)
        tile = torch.arange(tiles, dtype=torch.int32, device=device).expand(n_blocks, -1)
        full = torch.full((max(tiles, n_blocks),), width, dtype=torch.int32, device=device)
        n_tiles = torch.full((n_blocks,), tiles, dtype=torch.int32, device=device)
        return Window((first + every).expand(tiles, -1), full, first + every, every.expand(tiles, -1), tile, n_tiles)
    index, place, count = _compact(columns[:, first:end], n_places, first)
    if not need_weight:
        return Window(index, count, empty[0:0, 0:0].view(0), empty, empty, empty.view(0))
    key = torch.empty(width, dtype=torch.int32, device=device)
    order_kernel[triton.cdiv(width, 1024),](place, key, width, tiles, BLOCK=1024)
    order = torch.sort(key, stable=True).indices
    slot = place.index_select(1, order)
    del place  # four bytes a (tile, column), as slot is
    missing = n_blocks * COLUMNS - width
    padded = torch.nn.functional.pad(slot, (0, missing), value=-1) if missing else slot
    wanted = (padded >= 0).view(tiles, n_blocks, COLUMNS).any(2).t()
    tile, _, n_tiles = _compact((wanted * live.LIVE).to(torch.uint8).contiguous(), tiles, 0)
    return Window(index, count, (first + order).to(torch.int32), slot, tile, n_tiles)


def _compact(codes: Tensor, n_places: int, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """(index [rows, n_places], place [rows, columns], count [rows]) of the LIVE entries of ``codes``."""
    rows, n_columns = codes.shape
    index = torch.zeros(rows, n_places, dtype=torch.int32, device=codes.device)
    place = torch.empty(rows, n_columns, dtype=torch.int32, device=codes.device)
    count = torch.empty(rows, dtype=torch.int32, device=codes.device)
    compact_kernel[rows,](codes, index, place, count, codes.stride(0), n_columns, n_places, first, BLOCK=2048)
    return index, place, count


def _parts(tiles: int, n_blocks: int, processors: int) -> int:
    """Parts of V that finish the scan soonest: waves of programs times blocks a program, then the fewest parts."""

    def cost(parts: int) -> tuple[int, int]:
        return triton.cdiv(tiles * parts, processors) * triton.cdiv(n_blocks, parts), parts

    return min(range(1, min(n_blocks, max(WAVES * processors // tiles, 1)) + 1), key=cost)
