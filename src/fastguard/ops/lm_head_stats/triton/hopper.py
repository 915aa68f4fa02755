# mypy: disallow-untyped-defs=False
# (the arguments of a kernel are pointers and scalars of Triton's own; only constexprs can be annotated)
"""The scan of ``scan.py`` for GPUs that have a tensor memory accelerator and wide asynchronous products.

The same results into the same buffers, from the same ``combine_kernel`` on. What differs, and why:

- both operands come through descriptors (TMA), and a step is one product of 128 rows by 256 columns: half as much of x
  goes through shared memory per product, and no thread computes addresses;
- what is done with the products (`fold_octaves`) must not take the tensor cores' time: the target and the end of V are
  looked for a block at a time, exponents are one multiply-add and one exponential, and a column's peak is found as the
  OR of one bit an octave, two columns to a word: a quarter of the shuffles of a maximum each;
- programs are ordered so that those that run at once read GROUP tiles of x, which stay in the L2 cache, and the same
  columns of W.

Codes are octaves here, and those under the ladder's last step count as none. A head with a bias or a soft-cap, or a
call for mean logits, goes through ``scan.py``'s `fold`, 128 columns a step: there are not the registers for 256.

Prefixes and shapes: see the package. d_ is a descriptor.
"""

from __future__ import annotations

import math

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

import triton
from fastguard.ops import table
from fastguard.ops.launch import chip
from fastguard.ops.lm_head_stats.op import TILE
from fastguard.ops.lm_head_stats.triton.configs import BY_DESCRIPTORS, Blocks, by_descriptors
from fastguard.ops.lm_head_stats.triton.pieces import NEGATIVE, OCTAVE, THRESHOLDS
from fastguard.ops.lm_head_stats.triton.scan import Parts, fold, store_part
from fastguard.ops.vocabulary import Head

GROUP = tl.constexpr(32)
"""Tiles that run at once: 33 MB of x at D = 4096, of an H100's 50 MB of L2 cache."""

LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def either(a, b):
    """Bits of a or b."""
    return a | b


@triton.jit
def octaves(b_mass, top, TILE: tl.constexpr, BLOCK_V: tl.constexpr):
    """How many steps of the ladder each column's largest mass in a tile reaches, 0 to THRESHOLDS: [BLOCK_V] int32.

    ``top`` is the code of the ladder's first step; a row of NaN has no mass.
    """
    # Of the rows that a thread holds of a column (r and r + 8, as a product lays them out) first the larger.
    b_bits = tl.max(tl.reshape(b_mass, [TILE // 16, 2, 8, BLOCK_V]), 1).to(tl.int32, bitcast=True)
    b_bits = tl.where(b_bits < 0x40000000, b_bits, 0)  # of 2.0: a mass is at most 1, what is more is a NaN
    b_step = (b_bits >> 23) - ((top - 254) // OCTAVE + 127 - THRESHOLDS)
    b_bit = (1 << tl.minimum(tl.maximum(b_step, 0), THRESHOLDS)) >> 1
    o_half = 16 * tl.arange(0, 2)
    b_two = tl.sum(tl.reshape(b_bit, [TILE // 2, BLOCK_V // 16, 2, 8]) << o_half[None, None, :, None], 2)
    b_any = (tl.reduce(b_two, 0, either)[:, None, :] >> o_half[None, :, None]) & 0xFFFF
    b_reached = (b_any.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126  # of 2^k: k + 1
    return tl.reshape(tl.maximum(b_reached, 0), [BLOCK_V])


@triton.jit
def fold_octaves(
    state, b_z, i_first, b_target, m_n, p_columns, V, scale, top, TILE: tl.constexpr, BLOCK_V: tl.constexpr,
    MASS: tl.constexpr,
):  # fmt: skip
    """``scan.py``'s `fold` for the raw products b_z of a head without options, scale > 0."""
    b_max, b_sum, b_moment, b_drop = state
    o_v = i_first + tl.arange(0, BLOCK_V)
    m_here = (b_target >= i_first) & (b_target < i_first + BLOCK_V)
    if (tl.max(m_here.to(tl.int32), 0) > 0) | (i_first + BLOCK_V > V):
        b_z = tl.where((o_v < V)[None, :], b_z, 2 * NEGATIVE)
        b_z = tl.where(o_v[None, :] == b_target[:, None], 2 * NEGATIVE, b_z)
    b_new = tl.maximum(b_max, tl.max(b_z, 1) * scale)
    b_shrink = tl.exp2((b_max - b_new) * LOG2E)
    b_e = tl.exp2(b_z * (scale * LOG2E) - (b_new * LOG2E)[:, None])
    b_sum = b_sum * b_shrink + tl.sum(b_e, 1)
    if p_columns is not None:
        b_rest = tl.maximum(b_sum, 1.0)
        b_step = octaves(b_e * (1.0 / b_rest)[:, None], top, TILE, BLOCK_V)
        # The middle of an octave stands for all of it.
        b_code = tl.maximum(tl.minimum(top + OCTAVE * (b_step - THRESHOLDS) + OCTAVE // 2, 254), 0)
        tl.store(p_columns + o_v, tl.where(b_step > 0, b_code, 0).to(tl.uint8), mask=o_v < V)
        b_under = b_step[:, None] + tl.arange(0, THRESHOLDS)[None, :] < THRESHOLDS
        b_drop = tl.dot(b_e.to(MASS), b_under.to(MASS), b_drop * b_shrink[:, None], input_precision="ieee")
    return b_new, b_sum, b_moment, b_drop


@triton.jit
def scan_descriptors_kernel(
    d_x, d_weight, p_bias, p_target, p_target_logit, p_bound, p_columns, p_parts,
    N, V, D, stride_columns, n_tiles, n_parts, n_blocks, scale, softcap, log_v, top,
    TILE: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, OCTAVES: tl.constexpr, MASS: tl.constexpr,
):  # fmt: skip
    """``scan.py``'s `scan_kernel`, over ``n_blocks`` blocks of BLOCK_V columns. OCTAVES: fold by `fold_octaves`."""
    i_group = tl.program_id(0) // (GROUP * n_parts)
    n_here = tl.minimum(n_tiles - i_group * GROUP, GROUP)
    i_here = tl.program_id(0) % (GROUP * n_parts)
    i_tile, i_part = i_group * GROUP + i_here % n_here, i_here // n_here
    o_n = i_tile * TILE + tl.arange(0, TILE)
    m_n = o_n < N
    # The maximum starts at a lower bound of the rest lse: 1 <= sum wherever it was raised since. Rows beyond the last
    # have one that leaves them no mass.
    if p_bound is not None:
        b_max = tl.load(p_bound + o_n, mask=m_n, other=-NEGATIVE)
    else:
        b_max = tl.where(m_n, NEGATIVE, -NEGATIVE)
    b_none = tl.zeros([TILE], dtype=tl.float32)
    b_target = tl.load(p_target + o_n, mask=m_n, other=-1).to(tl.int32)
    state = b_max, b_none, b_none, tl.zeros([TILE, THRESHOLDS], dtype=tl.float32)
    if p_columns is not None:
        p_columns += i_tile.to(tl.int64) * stride_columns
    for i_block in range(i_part * n_blocks, tl.minimum((i_part + 1) * n_blocks, tl.cdiv(V, BLOCK_V))):
        i_first = i_block * BLOCK_V
        b_z = tl.zeros([TILE, BLOCK_V], dtype=tl.float32)
        for k in range(0, D, BLOCK_K):
            b_z = tl.dot(d_x.load([i_tile * TILE, k]), d_weight.load([i_first, k]).T, b_z, input_precision="ieee")
        if OCTAVES:
            state = fold_octaves(
                state, b_z, i_first, b_target, m_n, p_columns, V, scale, top, TILE, BLOCK_V, MASS
            )  # fmt: skip
        else:
            state = fold(
                state, b_z, i_first + tl.arange(0, BLOCK_V), p_target + o_n, p_target_logit + o_n, m_n, p_bias,
                p_columns, V, scale, softcap, log_v, top, p_parts.moment is not None, MASS,
            )  # fmt: skip
    store_part(p_parts, state, i_part, o_n, m_n, N)


def serves(x: Tensor, head: Head) -> bool:
    """Whether x [N, D] and the head can be read through descriptors, on a device that has them (from Hopper on).

    Consumer GPUs that have them lack the shared memory for blocks of this width.
    """
    capable = (
        x.device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(x.device)[0] >= 9
    )
    aligned = x.shape[1] % 8 == 0 and x.data_ptr() % 16 == 0 and head.weight.data_ptr() % 16 == 0
    shapes = by_descriptors(x.dtype, x.shape[1], options=False)
    fits = capable and table.row_of(BY_DESCRIPTORS, shapes, chip(x.device)) is not None
    return fits and aligned and x.element_size() == 2 and head.scale > 0


def plain(head: Head, with_mean: bool) -> bool:
    """Whether a call has none of the options that `fold_octaves` leaves out."""
    return not with_mean and head.bias is None and head.softcap is None


def blocks_of(x: Tensor, head: Head, with_mean: bool) -> Blocks:
    """Columns and features of a step, warps, pipeline stages of a call."""
    shapes = by_descriptors(x.dtype, x.shape[1], options=not plain(head, with_mean))
    return table.find(BY_DESCRIPTORS, shapes, chip(x.device), Blocks)


def parts_of(tiles: int, n_blocks: int, processors: int) -> int:
    """Parts of V, so that the programs of a group of tiles fill the device once."""
    return max(min(processors // min(tiles, GROUP.value), n_blocks), 1)


def scan(
    x: Tensor,
    head: Head,
    target: Tensor,
    target_logit: Tensor,
    bound: Tensor | None,
    columns: Tensor | None,
    parts: Parts,
    per_part: int,
    top: int,
) -> None:
    """Launch the scan; ``per_part`` blocks of `blocks_of` to a part."""
    (n, d), v = x.shape, head.weight.shape[0]
    blocks = blocks_of(x, head, parts.moment is not None)
    tiles, n_parts = triton.cdiv(n, TILE), parts.total.shape[0]
    scan_descriptors_kernel[(tiles * n_parts,)](
        TensorDescriptor.from_tensor(x, [TILE, blocks.inner]),
        TensorDescriptor.from_tensor(head.weight, [blocks.outer, blocks.inner]),
        head.bias, target, target_logit, bound, columns, parts,
        n, v, d, 0 if columns is None else columns.stride(0), tiles, n_parts, per_part,
        head.scale, head.softcap, math.log(v), top,
        TILE=TILE, BLOCK_V=blocks.outer, BLOCK_K=blocks.inner, OCTAVES=plain(head, parts.moment is not None),
        MASS=tl.bfloat16 if x.device.type == "cuda" else tl.float32,  # the interpreter has no products of bfloat16
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
