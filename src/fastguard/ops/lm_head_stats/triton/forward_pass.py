"""The launches of the forward."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import triton.language as tl
from torch import Tensor

import triton
from fastguard.ops.launch import chip, on_device, precision, processors
from fastguard.ops.lm_head_stats import live, portable
from fastguard.ops.lm_head_stats.op import TILE, Row
from fastguard.ops.lm_head_stats.triton import hopper
from fastguard.ops.lm_head_stats.triton.combine import combine_kernel, mark_kernel
from fastguard.ops.lm_head_stats.triton.configs import config
from fastguard.ops.lm_head_stats.triton.pieces import THRESHOLDS
from fastguard.ops.lm_head_stats.triton.scan import Parts, _parts, scan_kernel
from fastguard.ops.lm_head_stats.triton.target import target_kernel
from fastguard.ops.vocabulary import Head

SAMPLE = 2048
"""Columns that give the scan its starting point; used from 8 times as many columns on (1.6% of V = 128256)."""

ROUNDING = 1 - 2.0**-8
"""What sums of bf16 masses keep of the true sums, at least."""


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
    place = torch.searchsorted(sample, target).clamp_max(SAMPLE - 1)
    place = torch.where(sample[place] == target, place, -1)
    bias = None if head.bias is None else head.bias[sample]
    return _scan(x, replace(head, weight=head.weight[sample], bias=bias), place, target_logit)[1]


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
    (n, d), v = x.shape, head.weight.shape[0]
    tiles = triton.cdiv(n, TILE)
    by_descriptors = hopper.serves(x, head)
    if by_descriptors:
        blocks = hopper.blocks_of(x, head, with_mean)
        n_blocks, parts_of = triton.cdiv(v, blocks.outer), hopper.parts_of
    else:
        blocks = config(x.dtype, d, chip(x.device)).scan
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
