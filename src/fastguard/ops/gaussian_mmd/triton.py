# mypy: disallow-untyped-defs=False
# (the arguments of a kernel are pointers and scalars of Triton's own; only constexprs can be annotated)
"""``gaussian_mmd`` on GPUs, in Triton; float64 inputs are handed to ``portable.py``.

Features are taken in noise blocks of 64 (see ``fastguard.ops.philox``), numbered token by token over the tokens
that some sample keeps, so that programs share the live work evenly whatever the mask:

1. ``order_kernel``: the live tokens, in order, then the dead ones, and how many live; nothing comes to the host;
2. ``gram_kernel``: a program owns a span of live blocks and accumulates the inner products of samples and noise,
   made in registers; one partial result per program;
3. ``reduce_kernel``: sums the partial results in order, without atomics, into the Gram matrix [R, R];
4. ``mmd_kernel``: distances, bandwidth, kernels and their sum;
5. ``coefficient_kernel`` and ``gradient_kernel`` (backward): dx = coefficients @ (samples, noise), with a program
   per tile of features, noise remade row by row and left out where the row is masked; dead tokens get zeros.

What bounds it is the making of noise (some 50 instructions a normal), not the 2 bytes a feature of memory traffic.
Products are "tf32x3", as accurate as fp32; within an item of work they are summed by the tensor core, across items
in fp32 with rounding to nearest.

Prefixes: p_ pointer, i_ index of a program or step, o_ offsets, m_ mask, b_ block of values, n_ count.
Shapes: L layers, B samples, F features, T tokens of D features, R = 2B rows (samples, then noise), S spans.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

import triton
from fastguard.ops import table
from fastguard.ops.gaussian_mmd import portable
from fastguard.ops.gaussian_mmd.portable import Source
from fastguard.ops.gaussian_mmd.reference import KERNELS as N_KERNELS
from fastguard.ops.launch import chip, on_device
from fastguard.ops.philox import BLOCK, LANES

NOISE_BLOCK = tl.constexpr(BLOCK)
NOISE_LANES = tl.constexpr(LANES)
KERNELS = tl.constexpr(N_KERNELS)
TINY = tl.constexpr(float(torch.finfo(torch.float32).tiny))

MAX_SAMPLES = 16
"""Samples of a program's tile; larger batches are covered by pairs of tiles, which remake noise."""

SPANS = 1024
"""Most programs per layer and pair of tiles that share the live blocks."""

ROWS = 16
"""Rows of a 2B x 2B matrix handled at a time."""


@triton.jit
def pair_of_normals(b_p, b_q):
    """r cos a and r sin a of two words, in fp32 arithmetic within 1e-6; the same steps as csrc/cpu/philox.h."""
    b_u = ((b_p >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    b_above = b_u.to(tl.int32, bitcast=True) - 0x3F3504F3  # log: 2^e m with m in [sqrt(1/2), sqrt(2))
    b_e = (b_above >> 23).to(tl.float32)
    b_f = ((b_above & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    b_poly = -0.0785954595 * b_f + 0.128816217
    b_poly = b_poly * b_f - 0.131287679
    b_poly = b_poly * b_f + 0.141811967
    b_poly = b_poly * b_f - 0.166245535
    b_poly = b_poly * b_f + 0.200022861
    b_poly = b_poly * b_f - 0.250008106
    b_poly = b_poly * b_f + 0.333333164
    b_square = b_f * b_f
    b_tail = 0.5 * b_square - (b_poly * b_f * b_square + b_e * 1.428606765330187e-06)
    b_radius = tl.sqrt(-2.0 * (b_e * 0.693145751953125 + (b_f - b_tail)))
    b_turn = (b_q >> 8).to(tl.int32)  # the nearest quarter turn is taken off in integers: the rest is exact
    b_quarter = (b_turn + (1 << 21)) >> 22
    b_a = (b_turn - (b_quarter << 22)).to(tl.float32) * 3.7450705e-07
    b_y = b_a * b_a
    b_sin = b_a + b_a * b_y * (-0.166666552 + b_y * (0.008332178 + b_y * -0.000195172659))
    b_cos = 1.0 - (0.5 * b_y - b_y * b_y * (0.0416666456 + b_y * (-0.00138873677 + b_y * 2.44384137e-05)))
    m_odd = (b_quarter & 1) != 0
    b_first = b_radius * tl.where(m_odd, b_sin, b_cos)
    b_second = b_radius * tl.where(m_odd, b_cos, b_sin)
    b_first = tl.where(((b_quarter + 1) & 2) != 0, -b_first, b_first)
    return b_first, tl.where((b_quarter & 2) != 0, -b_second, b_second)


@triton.jit
def words_of(b_group, b_sample, layer, call, k0, k1):
    """The four words of the counters (group, sample, layer, call); b_group and b_sample have one shape."""
    b_zero = b_group ^ b_group
    return tl.philox_impl(b_group, b_sample, b_zero + layer, b_zero + call, k0, k1)


@triton.jit
def blocks_of(
    i_first, n_blocks, p_order, per_token, D, COUNTERS: tl.constexpr, ALIGNED: tl.constexpr, HAS_MASK: tl.constexpr
):
    """Noise block and token of COUNTERS counters from the i_first-th block on, and which of them there are."""
    o = i_first + tl.arange(0, COUNTERS) // NOISE_LANES
    m = o < n_blocks
    if HAS_MASK:
        b_token = tl.load(p_order + o // per_token, mask=m, other=0)
        if ALIGNED:
            b_block = b_token * per_token + o % per_token
        else:
            b_block = ((b_token.to(tl.int64) * D) // NOISE_BLOCK).to(tl.int32) + o % per_token
    else:
        b_token = o * 0
        b_block = o
    return b_block, b_token, m


@triton.jit
def features_of(b_block, b_token, m, word, D, COUNTERS: tl.constexpr, ALIGNED: tl.constexpr):
    """Feature [COUNTERS] that each counter's word makes, and whether it is one of its token."""
    b_f = b_block.to(tl.int64) * NOISE_BLOCK + word * NOISE_LANES + tl.arange(0, COUNTERS) % NOISE_LANES
    if not ALIGNED:
        b_start = b_token.to(tl.int64) * D
        m = m & (b_f >= b_start) & (b_f < b_start + D)
    return tl.max_contiguous(tl.multiple_of(b_f, 16), 16), m


@triton.jit
def order_kernel(p_mask, p_order, p_live, B, T, TOKENS: tl.constexpr):
    """order [T]: the tokens that any sample of mask [B, T] keeps, ascending, then the others; live [1]: how many."""
    n_live = 0
    n_dead = 0
    for start in range(0, T, TOKENS):
        o_t = start + tl.arange(0, TOKENS)
        m_t = o_t < T
        b_any = tl.zeros([TOKENS], dtype=tl.int32)
        for i in range(B):
            b_any |= tl.load(p_mask + tl.cast(i, tl.int64) * T + o_t, mask=m_t, other=0).to(tl.int32)
        b_live = (b_any != 0).to(tl.int32)
        b_dead = ((b_any == 0) & m_t).to(tl.int32)
        b_place = tl.where(b_live > 0, n_live + tl.cumsum(b_live, 0) - 1, T - n_dead - tl.cumsum(b_dead, 0))
        tl.store(p_order + b_place, o_t, mask=m_t)
        n_live += tl.sum(b_live, 0)
        n_dead += tl.sum(b_dead, 0)
    tl.store(p_live, n_live)


@triton.jit
def kept(p_mask, b_token, m_block, o_b, m_b, T, HAS_MASK: tl.constexpr):
    """Which counters of which samples count: [SAMPLES, COUNTERS]."""
    m = m_b[:, None] & m_block[None, :]
    if HAS_MASK:
        m = m & (tl.load(p_mask + o_b.to(tl.int64)[:, None] * T + b_token[None, :], mask=m, other=0) != 0)
    return m


@triton.jit
def tile(
    word, b_z, p_x, p_noise, b_block, b_token, m_block, o_b, m_kept, D, F, stride_b,
    COUNTERS: tl.constexpr, ALIGNED: tl.constexpr, HAS_NOISE: tl.constexpr,
):  # fmt: skip
    """Samples and noise [SAMPLES, COUNTERS] in fp32 at one word's features, zero where masked."""
    b_f, m_f = features_of(b_block, b_token, m_block, word, D, COUNTERS, ALIGNED)
    m = m_kept & m_f[None, :]
    b_x = tl.load(p_x + o_b.to(tl.int64)[:, None] * stride_b + b_f[None, :], mask=m, other=0.0).to(tl.float32)
    if HAS_NOISE:
        b_z = tl.load(p_noise + o_b.to(tl.int64)[:, None] * F + b_f[None, :], mask=m, other=0.0).to(tl.float32)
    else:
        b_z = tl.where(m, b_z, 0.0)
    return b_x, b_z


@triton.jit
def noise_tile(b_block, o_b, layer, call, sample_offset, k0, k1, COUNTERS: tl.constexpr):
    """The four normals of each counter of each sample: four [SAMPLES, COUNTERS]."""
    b_group = b_block.to(tl.uint32) * NOISE_LANES + (tl.arange(0, COUNTERS) % NOISE_LANES).to(tl.uint32)
    b_sample = (sample_offset + o_b.to(tl.int64)).to(tl.uint32)
    b_group, b_sample = tl.broadcast(b_group[None, :], b_sample[:, None])
    b_w0, b_w1, b_w2, b_w3 = words_of(b_group, b_sample, layer, call, k0, k1)
    b_z0, b_z1 = pair_of_normals(b_w0, b_w1)
    b_z2, b_z3 = pair_of_normals(b_w2, b_w3)
    return b_z0, b_z1, b_z2, b_z3


@triton.jit
def stacked(
    first_word, b_n0, b_n1, b_n2, b_n3, p_x, p_noise, b_block, b_token, m_block, o_b, m_kept, D, F, stride_b,
    SAMPLES: tl.constexpr, WORDS: tl.constexpr, COUNTERS: tl.constexpr, ALIGNED: tl.constexpr,
    HAS_NOISE: tl.constexpr,
):  # fmt: skip
    """Rows [SAMPLES * WORDS * 2, COUNTERS]: sample, word, then sample or noise; see ``gram_kernel``."""
    b_x0, b_z0 = tile(
        first_word, b_n0, p_x, p_noise, b_block, b_token, m_block, o_b, m_kept, D, F, stride_b,
        COUNTERS, ALIGNED, HAS_NOISE,
    )  # fmt: skip
    b_v = tl.join(b_x0, b_z0)
    if WORDS == 1:
        b_v = tl.permute(b_v, (0, 2, 1))
    else:
        b_x1, b_z1 = tile(
            first_word + 1, b_n1, p_x, p_noise, b_block, b_token, m_block, o_b, m_kept, D, F, stride_b,
            COUNTERS, ALIGNED, HAS_NOISE,
        )  # fmt: skip
        b_v = tl.join(b_v, tl.join(b_x1, b_z1))
        if WORDS == 2:
            b_v = tl.permute(b_v, (0, 3, 2, 1))
        else:
            b_x2, b_z2 = tile(
                first_word + 2, b_n2, p_x, p_noise, b_block, b_token, m_block, o_b, m_kept, D, F, stride_b,
                COUNTERS, ALIGNED, HAS_NOISE,
            )  # fmt: skip
            b_x3, b_z3 = tile(
                first_word + 3, b_n3, p_x, p_noise, b_block, b_token, m_block, o_b, m_kept, D, F, stride_b,
                COUNTERS, ALIGNED, HAS_NOISE,
            )  # fmt: skip
            b_v = tl.permute(tl.join(b_v, tl.join(tl.join(b_x2, b_z2), tl.join(b_x3, b_z3))), (0, 4, 3, 2, 1))
    return tl.reshape(b_v, (2 * SAMPLES * WORDS, COUNTERS))


@triton.jit
def gram_kernel(
    p_x, p_mask, p_noise, p_call, p_order, p_live, p_partial,
    B, T, D, F, per_token, stride_l, stride_b, seed_low, seed_high, layer, sample_offset, n_tiles,
    SAMPLES: tl.constexpr, WORDS: tl.constexpr, COUNTERS: tl.constexpr, ONE_TILE: tl.constexpr,
    ALIGNED: tl.constexpr, HAS_MASK: tl.constexpr, HAS_NOISE: tl.constexpr,
):  # fmt: skip
    """partial [L, n_tiles^2, S, 2 SAMPLES WORDS, 2 SAMPLES WORDS]: products of a span's rows, by pairs of tiles.

    A tensor core multiplies 16 rows: fewer than eight samples are stacked with their noise for WORDS words at once,
    and the products of different words are left aside by ``reduce_kernel``.
    """
    i_span, i_pair, i_layer = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n_spans = tl.num_programs(0)
    o_i = (i_pair // n_tiles) * SAMPLES + tl.arange(0, SAMPLES)
    o_j = (i_pair % n_tiles) * SAMPLES + tl.arange(0, SAMPLES)
    m_i, m_j = o_i < B, o_j < B
    call = tl.load(p_call).to(tl.uint32)
    k0, k1 = tl.cast(seed_low, tl.uint32), tl.cast(seed_high, tl.uint32)
    word2 = (layer + i_layer.to(tl.int64)).to(tl.uint32)
    p_x += i_layer.to(tl.int64) * stride_l
    if HAS_NOISE:
        p_noise += i_layer.to(tl.int64) * B * F
    n_blocks = per_token
    if HAS_MASK:
        n_blocks = tl.load(p_live) * per_token
    PER_ITEM: tl.constexpr = COUNTERS // NOISE_LANES
    n_items = tl.cdiv(n_blocks, PER_ITEM)
    first = n_items // n_spans * i_span + tl.minimum(n_items % n_spans, i_span)
    last = first + n_items // n_spans + (i_span < n_items % n_spans).to(tl.int32)
    ROWS: tl.constexpr = 2 * SAMPLES * WORDS
    b_sum = tl.zeros([ROWS, ROWS], dtype=tl.float32)
    for i_item in range(first, last):
        b_block, b_token, m_block = blocks_of(
            i_item * PER_ITEM, n_blocks, p_order, per_token, D, COUNTERS, ALIGNED, HAS_MASK
        )
        m_left = kept(p_mask, b_token, m_block, o_i, m_i, T, HAS_MASK)
        b_n0, b_n1, b_n2, b_n3 = noise_tile(b_block, o_i, word2, call, sample_offset, k0, k1, COUNTERS)
        if not ONE_TILE:
            m_right = kept(p_mask, b_token, m_block, o_j, m_j, T, HAS_MASK)
            b_o0, b_o1, b_o2, b_o3 = noise_tile(b_block, o_j, word2, call, sample_offset, k0, k1, COUNTERS)
        # The sum of one item starts from zero: across items it is added with rounding, which tensor cores leave out.
        b_item = tl.zeros([ROWS, ROWS], dtype=tl.float32)
        for word in tl.static_range(0, 4, WORDS):
            if WORDS == 1:
                b_n0 = b_n0 if word == 0 else (b_n1 if word == 1 else (b_n2 if word == 2 else b_n3))
            elif word == 2:
                b_n0, b_n1 = b_n2, b_n3
            b_v = stacked(
                word, b_n0, b_n1, b_n2, b_n3, p_x, p_noise, b_block, b_token, m_block, o_i, m_left, D, F,
                stride_b, SAMPLES, WORDS, COUNTERS, ALIGNED, HAS_NOISE,
            )  # fmt: skip
            b_u = b_v
            if not ONE_TILE:
                b_o = b_o0 if word == 0 else (b_o1 if word == 1 else (b_o2 if word == 2 else b_o3))
                b_u = stacked(
                    word, b_o, b_o, b_o, b_o, p_x, p_noise, b_block, b_token, m_block, o_j, m_right, D, F,
                    stride_b, SAMPLES, WORDS, COUNTERS, ALIGNED, HAS_NOISE,
                )  # fmt: skip
            b_item = tl.dot(b_v, tl.trans(b_u), b_item, input_precision="tf32x3")
        b_sum += b_item
    i_out = (i_layer.to(tl.int64) * tl.num_programs(1) + i_pair) * n_spans + i_span
    o = tl.arange(0, ROWS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    tl.store(p_partial + i_out * (ROWS * ROWS) + o, b_sum)


@triton.jit
def reduce_kernel(
    p_partial, p_gram, B, n_tiles, n_spans, SAMPLES: tl.constexpr, WORDS: tl.constexpr, SPANS: tl.constexpr
):
    """gram [L, R, R] from the partial results, one row of a tile a program, summed over spans and words in order."""
    i_row, i_pair, i_layer = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    SIDE: tl.constexpr = 2 * SAMPLES
    ROWS: tl.constexpr = SIDE * WORDS
    o_c = tl.arange(0, SIDE)
    o_s = tl.arange(0, SPANS)
    p_in = p_partial + (i_layer.to(tl.int64) * tl.num_programs(1) + i_pair) * n_spans * (ROWS * ROWS)
    b_sum = tl.zeros([SPANS, SIDE], dtype=tl.float32)
    for start in range(0, n_spans, SPANS):
        p_span = p_in + (start + o_s).to(tl.int64)[:, None] * (ROWS * ROWS)
        for word in tl.static_range(WORDS):
            row = i_row // 2 * (2 * WORDS) + 2 * word + i_row % 2
            o_column = o_c // 2 * (2 * WORDS) + 2 * word + o_c % 2
            m = (start + o_s < n_spans)[:, None] & (o_c >= 0)[None, :]
            b_sum += tl.load(p_span + row * ROWS + o_column[None, :], mask=m, other=0.0)
    sample = (i_pair // n_tiles) * SAMPLES + i_row // 2
    o_j = (i_pair % n_tiles) * SAMPLES + o_c // 2
    p_out = p_gram + i_layer.to(tl.int64) * (4 * B * B) + (sample + i_row % 2 * B) * (2 * B) + o_j + o_c % 2 * B
    tl.store(p_out, tl.sum(b_sum, 0), mask=(sample < B) & (o_j < B))


@triton.jit
def distance_rows(p_gram, start, last, R, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Squared distances [ROWS, COLUMNS] of the rows from ``start`` on, zero from row ``last`` on; the rows' numbers."""
    o_i, o_j = start + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    m_i, m_j = o_i < last, o_j < R
    b_ni = tl.load(p_gram + o_i * (R + 1), mask=m_i, other=0.0)
    b_nj = tl.load(p_gram + o_j * (R + 1), mask=m_j, other=0.0)
    m = m_i[:, None] & m_j[None, :]
    b_g = tl.load(p_gram + o_i[:, None] * R + o_j[None, :], mask=m, other=0.0)
    b_d = b_ni[:, None] + b_nj[None, :] - 2.0 * b_g
    return tl.where(m & ((b_d > 0) | (b_d != b_d)), b_d, 0.0), o_i, o_j, m  # keeps NaN


@triton.jit
def inverse_bandwidth(p_gram, R, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """1 / bandwidth, or 0 where all rows coincide."""
    b_total = tl.zeros([ROWS], dtype=tl.float32)
    for start in range(0, R, ROWS):
        b_d, _, _, _ = distance_rows(p_gram, start, R, R, ROWS, COLUMNS)
        b_total += tl.sum(b_d, 1)
    rows = tl.cast(R, tl.float32)
    bandwidth = tl.sum(b_total, 0) / (4.0 * rows * (rows - 1.0))
    return tl.where(bandwidth >= TINY, 1.0 / tl.where(bandwidth >= TINY, bandwidth, 1.0), 0.0)


@triton.jit
def mmd_kernel(p_gram, p_mmd, B, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """mmd [L] from gram [L, R, R]."""
    i_layer = tl.program_id(0)
    R = 2 * B
    p_gram += i_layer.to(tl.int64) * R * R
    inverse = inverse_bandwidth(p_gram, R, ROWS, COLUMNS)
    b_total = tl.zeros([ROWS], dtype=tl.float32)
    for start in range(0, R, ROWS):
        b_d, o_i, o_j, m = distance_rows(p_gram, start, R, R, ROWS, COLUMNS)
        b_k = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        for i in tl.static_range(KERNELS):
            b_k += tl.exp(b_d * inverse * -(0.5**i))
        b_sign = tl.where((o_i < B)[:, None] == (o_j < B)[None, :], 1.0, -1.0)
        b_total += tl.sum(tl.where(m, b_k * b_sign, 0.0), 1)
    tl.store(p_mmd + i_layer, tl.sum(b_total, 0) / (tl.cast(B, tl.float32) * B))


@triton.jit
def coefficient_kernel(p_gram, p_grad, p_out, stride_grad, B, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out [L, R, B]: coefficient of row r in the gradient of sample i, transposed; see ``portable.coefficients``."""
    i_block, i_layer = tl.program_id(0), tl.program_id(1)
    R = 2 * B
    p_gram += i_layer.to(tl.int64) * R * R
    inverse = inverse_bandwidth(p_gram, R, ROWS, COLUMNS)
    b_d, o_i, o_j, m = distance_rows(p_gram, i_block * ROWS, B, R, ROWS, COLUMNS)
    b_s = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for i in tl.static_range(KERNELS):
        b_s += tl.exp(b_d * inverse * -(0.5**i)) * (0.5**i)
    grad = tl.load(p_grad + i_layer * stride_grad).to(tl.float32)
    b_c = b_s * inverse * (4.0 * grad / (tl.cast(B, tl.float32) * B))
    b_c = tl.where(m & (o_i[:, None] != o_j[None, :]), tl.where((o_j < B)[None, :], b_c, -b_c), 0.0)
    b_c = tl.where(o_i[:, None] == o_j[None, :], -tl.sum(b_c, 1)[:, None], b_c)
    tl.store(p_out + i_layer.to(tl.int64) * R * B + o_j[None, :] * B + o_i[:, None], b_c, mask=m)


@triton.jit
def gradient_kernel(
    p_x, p_mask, p_noise, p_call, p_order, p_live, p_coefficient, p_dx,
    B, T, D, F, per_token, stride_l, stride_b, seed_low, seed_high, layer, sample_offset,
    SAMPLES: tl.constexpr, COUNTERS: tl.constexpr, ALIGNED: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_NOISE: tl.constexpr,
):  # fmt: skip
    """dx [L, B, F] = mask * (coefficient^T [B, R] @ rows) for SAMPLES samples and 4 COUNTERS features."""
    i_part, i_tile, i_layer = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_i = i_tile * SAMPLES + tl.arange(0, SAMPLES)
    m_i = o_i < B
    call = tl.load(p_call).to(tl.uint32)
    k0, k1 = tl.cast(seed_low, tl.uint32), tl.cast(seed_high, tl.uint32)
    word2 = (layer + i_layer.to(tl.int64)).to(tl.uint32)
    p_x += i_layer.to(tl.int64) * stride_l
    p_dx += i_layer.to(tl.int64) * B * F
    p_coefficient += i_layer.to(tl.int64) * 2 * B * B + o_i
    if HAS_NOISE:
        p_noise += i_layer.to(tl.int64) * B * F
    b_block, b_token, m_block = blocks_of(
        i_part * (COUNTERS // NOISE_LANES), T * per_token, p_order, per_token, D, COUNTERS, ALIGNED, HAS_MASK
    )
    b_f0, m_f0 = features_of(b_block, b_token, m_block, 0, D, COUNTERS, ALIGNED)
    b_f1, m_f1 = features_of(b_block, b_token, m_block, 1, D, COUNTERS, ALIGNED)
    b_f2, m_f2 = features_of(b_block, b_token, m_block, 2, D, COUNTERS, ALIGNED)
    b_f3, m_f3 = features_of(b_block, b_token, m_block, 3, D, COUNTERS, ALIGNED)
    b_d0 = tl.zeros([SAMPLES, COUNTERS], dtype=tl.float32)
    b_d1 = tl.zeros([SAMPLES, COUNTERS], dtype=tl.float32)
    b_d2 = tl.zeros([SAMPLES, COUNTERS], dtype=tl.float32)
    b_d3 = tl.zeros([SAMPLES, COUNTERS], dtype=tl.float32)
    b_group = b_block.to(tl.uint32) * NOISE_LANES + (tl.arange(0, COUNTERS) % NOISE_LANES).to(tl.uint32)
    n_rows = B
    if HAS_MASK:  # a tile of dead tokens only
        n_rows = tl.where(i_part * (COUNTERS // NOISE_LANES) < tl.load(p_live) * per_token, B, 0)
    for r in range(n_rows):
        m = m_block
        if HAS_MASK:
            m = m & (tl.load(p_mask + tl.cast(r, tl.int64) * T + b_token, mask=m, other=0) != 0)
        if tl.max(m.to(tl.int32), 0) > 0:
            p_row = p_x + tl.cast(r, tl.int64) * stride_b
            b_cx = tl.load(p_coefficient + r * B, mask=m_i, other=0.0)[:, None]
            b_cz = tl.load(p_coefficient + (B + r) * B, mask=m_i, other=0.0)[:, None]
            if HAS_NOISE:
                p_z = p_noise + tl.cast(r, tl.int64) * F
                b_z0 = tl.load(p_z + b_f0, mask=m & m_f0, other=0.0).to(tl.float32)
                b_z1 = tl.load(p_z + b_f1, mask=m & m_f1, other=0.0).to(tl.float32)
                b_z2 = tl.load(p_z + b_f2, mask=m & m_f2, other=0.0).to(tl.float32)
                b_z3 = tl.load(p_z + b_f3, mask=m & m_f3, other=0.0).to(tl.float32)
            else:
                b_sample = (b_group ^ b_group) + (sample_offset + tl.cast(r, tl.int64)).to(tl.uint32)
                b_w0, b_w1, b_w2, b_w3 = words_of(b_group, b_sample, word2, call, k0, k1)
                b_z0, b_z1 = pair_of_normals(b_w0, b_w1)
                b_z2, b_z3 = pair_of_normals(b_w2, b_w3)
            b_x = tl.load(p_row + b_f0, mask=m & m_f0, other=0.0).to(tl.float32)
            b_d0 += b_cx * b_x[None, :] + b_cz * tl.where(m, b_z0, 0.0)[None, :]
            b_x = tl.load(p_row + b_f1, mask=m & m_f1, other=0.0).to(tl.float32)
            b_d1 += b_cx * b_x[None, :] + b_cz * tl.where(m, b_z1, 0.0)[None, :]
            b_x = tl.load(p_row + b_f2, mask=m & m_f2, other=0.0).to(tl.float32)
            b_d2 += b_cx * b_x[None, :] + b_cz * tl.where(m, b_z2, 0.0)[None, :]
            b_x = tl.load(p_row + b_f3, mask=m & m_f3, other=0.0).to(tl.float32)
            b_d3 += b_cx * b_x[None, :] + b_cz * tl.where(m, b_z3, 0.0)[None, :]
    m_keep = kept(p_mask, b_token, m_block, o_i, m_i, T, HAS_MASK)
    p_out = p_dx + o_i.to(tl.int64)[:, None] * F
    dtype = p_dx.dtype.element_ty
    tl.store(p_out + b_f0[None, :], tl.where(m_keep, b_d0, 0.0).to(dtype), mask=m_i[:, None] & m_f0[None, :])
    tl.store(p_out + b_f1[None, :], tl.where(m_keep, b_d1, 0.0).to(dtype), mask=m_i[:, None] & m_f1[None, :])
    tl.store(p_out + b_f2[None, :], tl.where(m_keep, b_d2, 0.0).to(dtype), mask=m_i[:, None] & m_f2[None, :])
    tl.store(p_out + b_f3[None, :], tl.where(m_keep, b_d3, 0.0).to(dtype), mask=m_i[:, None] & m_f3[None, :])


class Plan(NamedTuple):
    """What the two large kernels share: work in noise blocks, and the tokens' order."""

    tokens: int
    width: int  # features of a token, D
    per_token: int  # noise blocks that a token may touch
    aligned: bool  # tokens begin and end with a noise block
    order: Tensor | None
    live: Tensor | None
    mask: Tensor | None


def plan_of(x: Tensor, mask: Tensor | None) -> Plan:
    """The plan for x [L, B, F] under mask [B, T] (bool)."""
    _, b, features = x.shape
    tokens = 1 if mask is None else mask.shape[1]
    width = features // tokens
    aligned = width % BLOCK == 0
    # A token that begins inside a block touches one block more than its width fills.
    per_token = triton.cdiv(width if aligned or mask is None else width + BLOCK - 1, BLOCK)
    if mask is None:
        return Plan(tokens, width, per_token, aligned, None, None, None)
    mask = mask.view(torch.uint8)
    order = torch.empty(tokens, dtype=torch.int32, device=x.device)
    live = torch.empty(1, dtype=torch.int32, device=x.device)
    order_kernel[(1,)](mask, order, live, b, tokens, TOKENS=min(1024, triton.next_power_of_2(tokens)))
    return Plan(tokens, width, per_token, aligned, order, live, mask)


def _arguments(x: Tensor, source: Source, plan: Plan) -> tuple[object, ...]:
    seed = source.seed
    return (
        x.shape[1], plan.tokens, plan.width, x.shape[2], plan.per_token, x.stride(0), x.stride(1),
        seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, source.layer, source.sample_offset,
    )  # fmt: skip


def _flags(x: Tensor, source: Source, plan: Plan) -> dict[str, object]:
    samples = min(MAX_SAMPLES, max(2, triton.next_power_of_2(x.shape[1])))
    return {
        "SAMPLES": samples, "ALIGNED": plan.aligned, "HAS_MASK": plan.mask is not None,
        "HAS_NOISE": source.explicit is not None,
    }  # fmt: skip


class Blocks(NamedTuple):
    """Counters of a program's tile, per sample, each of 4 features; warps."""

    counters: int
    warps: int


def gram_blocks(samples: int, one_tile: bool, chip: table.Chip) -> Blocks:
    """Of a gram program: as many warps as its products keep busy and its rows fit into the registers of."""
    shape = ("a tile" if samples == MAX_SAMPLES else "part of a tile") if one_tile else "pairs of tiles"
    return table.find("gaussian_mmd.gram", (shape,), chip, Blocks)


def gradient_blocks(chip: table.Chip) -> Blocks:
    """Of a gradient program."""
    return table.find("gaussian_mmd.gradient", ("all",), chip, Blocks)


@on_device
def forward(x: Tensor, mask: Tensor | None, source: Source) -> tuple[Tensor, Tensor]:
    """See ``portable.forward``."""
    layers, b, _ = x.shape
    if x.dtype == torch.float64 or x.numel() == 0:
        return portable.forward(x, mask, source)
    noise = None if source.explicit is None else source.explicit.contiguous()
    plan = plan_of(x, mask)
    flags = _flags(x, source, plan)
    samples = int(flags["SAMPLES"])  # type: ignore[call-overload]
    blocks = gram_blocks(samples, b <= samples, chip(x.device))
    words = max(1, 8 // samples)
    rows, tiles = 2 * samples * words, triton.cdiv(b, samples)
    spans = min(SPANS, triton.cdiv(plan.tokens * plan.per_token, blocks.counters // LANES))
    partial = torch.empty(layers, tiles**2, spans, rows, rows, dtype=torch.float32, device=x.device)
    gram_kernel[(spans, tiles**2, layers)](
        x, plan.mask, noise, source.call, plan.order, plan.live, partial, *_arguments(x, source, plan), tiles,
        WORDS=words, COUNTERS=blocks.counters, ONE_TILE=tiles == 1, **flags, num_warps=blocks.warps,
    )  # fmt: skip
    gram = torch.empty(layers, 2 * b, 2 * b, dtype=torch.float32, device=x.device)
    reduce_kernel[(2 * samples, tiles**2, layers)](
        partial, gram, b, tiles, spans, SAMPLES=samples, WORDS=words, SPANS=min(32, triton.next_power_of_2(spans))
    )
    mmd = torch.empty(layers, dtype=torch.float32, device=x.device)
    mmd_kernel[(layers,)](gram, mmd, b, ROWS=ROWS, COLUMNS=triton.next_power_of_2(2 * b))
    return mmd, gram


@on_device
def backward(grad: Tensor, x: Tensor, mask: Tensor | None, source: Source, gram: Tensor) -> Tensor:
    """See ``portable.backward``."""
    layers, b, _ = x.shape
    if x.dtype == torch.float64 or x.numel() == 0:
        return portable.backward(grad, x, mask, source, gram)
    noise = None if source.explicit is None else source.explicit.contiguous()
    plan = plan_of(x, mask)
    flags = _flags(x, source, plan)
    coefficient = torch.empty(layers, 2 * b, b, dtype=torch.float32, device=x.device)
    coefficient_kernel[(triton.cdiv(b, ROWS), layers)](
        gram, grad, coefficient, grad.stride(0), b, ROWS=ROWS, COLUMNS=triton.next_power_of_2(2 * b)
    )
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    blocks = gradient_blocks(chip(x.device))
    parts = triton.cdiv(plan.tokens * plan.per_token, blocks.counters // LANES)
    gradient_kernel[(parts, triton.cdiv(b, int(flags["SAMPLES"])), layers)](  # type: ignore[call-overload]
        x, plan.mask, noise, source.call, plan.order, plan.live, coefficient, dx, *_arguments(x, source, plan),
        COUNTERS=blocks.counters, **flags, num_warps=blocks.warps,
    )  # fmt: skip
    return dx
