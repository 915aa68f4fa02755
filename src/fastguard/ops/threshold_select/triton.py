# mypy: disallow-untyped-defs=False
# (the arguments of a kernel are pointers and scalars of Triton's own; only constexprs can be annotated)
"""``threshold_select`` as GPU kernels: histograms in shared memory, added up by integer atomics, which are exact.

One launch a tensor and pass; what has been found of the threshold stays on the device between them. A row is one
program's, which finds all its digits at once: what it reads again is in cache, unless a row has millions of entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

import triton
from fastguard.ops.threshold_select import keys
from fastguard.ops.threshold_select.portable import SPAN

__all__ = ["BITS", "histogram", "rows", "ties", "write"]

BITS = 11
"""Of a digit: 2,048 counters, 8 KB."""

BLOCK = 1024
"""Entries in flight at a time."""

ROW_BITS = 8

WARPS = 8

TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}

INFINITY = {
    torch.float64: 0x7FF0000000000000,
    torch.float32: 0x7F800000,
    torch.bfloat16: 0x7F80,
    torch.float16: 0x7C00,
}
"""The key of the largest number there is: those beyond it are NaNs."""


@triton.jit
def load_keys(p_score, p_weight, o, within, WIDE: tl.constexpr, NUMBER: tl.constexpr):
    """Keys of the entries o: int64 for float64, else int32. A product is rounded to WIDE, then taken as NUMBER."""
    b_number = tl.load(p_score + o, mask=within, other=0.0)
    if p_weight is not None:
        b_number = tl.abs(tl.load(p_weight + o, mask=within, other=0.0).to(WIDE)) * b_number.to(WIDE)
    b_number = b_number.to(NUMBER)
    if tl.float64 == NUMBER:
        b_bits = b_number.to(tl.int64, bitcast=True)
        b_magnitude = b_bits & 0x7FFFFFFFFFFFFFFF
    elif tl.float32 == NUMBER:
        b_bits = b_number.to(tl.int32, bitcast=True)
        b_magnitude = b_bits & 0x7FFFFFFF
    else:
        b_bits = b_number.to(tl.int16, bitcast=True).to(tl.int32)
        b_magnitude = b_bits & 0x7FFF
    return tl.where(b_bits < 0, -b_magnitude, b_magnitude)


@triton.jit
def digits_of(b_key, SHIFT: tl.constexpr, BITS: tl.constexpr, FIRST: tl.constexpr):
    """The digit of BITS bits from SHIFT on; of the first one, which holds the sign, that of the lowest number is 0."""
    if FIRST:
        return ((b_key >> SHIFT) + (1 << (BITS - 1))).to(tl.int32)
    else:
        return ((b_key >> SHIFT) & ((1 << BITS) - 1)).to(tl.int32)


@triton.jit
def histogram_kernel(
    p_score, p_weight, n, p_prefix, p_counts, p_nan,
    SHIFT: tl.constexpr, BITS: tl.constexpr, FIRST: tl.constexpr, INFINITY: tl.constexpr,
    WIDE: tl.constexpr, NUMBER: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """counts [2^BITS] int64 += how often each digit occurs in a span behind the prefix; nan int32 = 1 for a NaN."""
    first = tl.program_id(0).to(tl.int64) * SPAN
    b_counts = tl.zeros([1 << BITS], dtype=tl.int32)
    nan = 0
    for start in range(0, tl.minimum(n - first, SPAN).to(tl.int32), BLOCK):
        o = first + start + tl.arange(0, BLOCK)
        b_key = load_keys(p_score, p_weight, o, o < n, WIDE, NUMBER)
        counted = o < n
        if FIRST:
            nan += tl.sum(((b_key > INFINITY) | (b_key < -INFINITY)).to(tl.int32), 0)
        else:
            counted = counted & ((b_key >> (SHIFT + BITS)) == tl.load(p_prefix))
        b_counts += tl.histogram(digits_of(b_key, SHIFT, BITS, FIRST), 1 << BITS, mask=counted)
    tl.atomic_add(p_counts + tl.arange(0, 1 << BITS), b_counts.to(tl.int64), mask=b_counts > 0, sem="relaxed")
    if FIRST:
        tl.atomic_max(p_nan, 1, mask=nan > 0, sem="relaxed")


@triton.jit
def ties_kernel(
    p_score, p_weight, n, p_key, p_counts,
    WIDE: tl.constexpr, NUMBER: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """counts [spans] int64 = how many keys of a span equal the key."""
    first = tl.program_id(0).to(tl.int64) * SPAN
    b_equal = tl.zeros([BLOCK], dtype=tl.int32)
    key = tl.load(p_key)
    for start in range(0, tl.minimum(n - first, SPAN).to(tl.int32), BLOCK):
        o = first + start + tl.arange(0, BLOCK)
        b_key = load_keys(p_score, p_weight, o, o < n, WIDE, NUMBER)
        b_equal += ((b_key == key) & (o < n)).to(tl.int32)
    tl.store(p_counts + tl.program_id(0), tl.sum(b_equal, 0).to(tl.int64))


@triton.jit
def count_row(
    p_score, p_weight, C, prefix,
    SHIFT: tl.constexpr, BITS: tl.constexpr, FIRST: tl.constexpr, INFINITY: tl.constexpr,
    WIDE: tl.constexpr, NUMBER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """[2^BITS]: how often each digit occurs in a row behind the prefix; and how many NaNs, of the first digit."""
    b_counts = tl.zeros([1 << BITS], dtype=tl.int32)
    nan = 0
    for start in range(0, C, BLOCK):
        o = start + tl.arange(0, BLOCK)
        b_key = load_keys(p_score, p_weight, o, o < C, WIDE, NUMBER)
        counted = o < C
        if FIRST:
            nan += tl.sum(((b_key > INFINITY) | (b_key < -INFINITY)).to(tl.int32), 0)
        else:
            counted = counted & ((b_key >> (SHIFT + BITS)) == prefix)
        b_counts += tl.histogram(digits_of(b_key, SHIFT, BITS, FIRST), 1 << BITS, mask=counted)
    return b_counts, nan


@triton.jit
def rows_kernel(
    p_score, p_weight, C, k, p_key, p_cut, p_nan,
    WIDTH: tl.constexpr, BITS: tl.constexpr, INFINITY: tl.constexpr,
    WIDE: tl.constexpr, NUMBER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """key, cut [rows] int64 of a row: its k-th largest key, and the column behind the last chosen one equal to it."""
    row = tl.program_id(0).to(tl.int64)
    p_score += row * C
    if p_weight is not None:
        p_weight += row * C
    bins = tl.arange(0, 1 << BITS)
    prefix = tl.zeros([], dtype=tl.int64)
    missing = tl.zeros([], dtype=tl.int32) + k
    for step in tl.static_range(0, WIDTH // BITS):
        b_counts, nan = count_row(
            p_score, p_weight, C, prefix, WIDTH - BITS * (step + 1), BITS, step == 0, INFINITY, WIDE, NUMBER, BLOCK
        )
        b_reached = tl.cumsum(b_counts, 0, reverse=True)
        digit = tl.sum((b_reached >= missing).to(tl.int32), 0) - 1
        missing -= tl.sum(tl.where(bins == digit, b_reached - b_counts, 0), 0)
        if step == 0:
            tl.atomic_max(p_nan, 1, mask=nan > 0, sem="relaxed")
            prefix = (digit - (1 << (BITS - 1))).to(tl.int64)
        else:
            prefix = prefix * (1 << BITS) + digit
    before = tl.zeros([], dtype=tl.int32)
    cut = tl.zeros([], dtype=tl.int32)
    for start in range(0, C, BLOCK):
        o = start + tl.arange(0, BLOCK)
        b_key = load_keys(p_score, p_weight, o, o < C, WIDE, NUMBER)
        b_equal = ((b_key == prefix) & (o < C)).to(tl.int32)
        b_nth = before + tl.cumsum(b_equal, 0)
        cut = tl.maximum(cut, tl.max(tl.where((b_equal > 0) & (b_nth <= missing), o + 1, 0), 0))
        before += tl.sum(b_equal, 0)
    tl.store(p_key + row, prefix)
    tl.store(p_cut + row, cut.to(tl.int64))


@triton.jit
def write_kernel(
    p_score, p_weight, n, C, p_key, p_cut, p_mask,
    ONE_ROW: tl.constexpr, WIDE: tl.constexpr, NUMBER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """mask [n / 8]: keys above their row's, and those equal to it in columns before the row's cut."""
    byte = tl.program_id(0).to(tl.int64) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    place = tl.arange(0, 8)
    o = byte[:, None] * 8 + place[None, :]
    b_key = load_keys(p_score, p_weight, o, o < n, WIDE, NUMBER)
    if ONE_ROW:
        above = tl.load(p_key)
        chosen = (b_key > above) | ((b_key == above) & (o < tl.load(p_cut)))
    else:
        b_row = o // C
        b_above = tl.load(p_key + b_row, mask=o < n, other=0)
        b_cut = tl.load(p_cut + b_row, mask=o < n, other=0)
        chosen = (b_key > b_above) | ((b_key == b_above) & (o - b_row * C < b_cut))
    b_bits = (chosen & (o < n)).to(tl.int32) << place[None, :]
    tl.store(p_mask + byte, tl.sum(b_bits, 1).to(tl.uint8), mask=byte * 8 < n)


def _launch(
    kernel: Any, programs: int, score: Tensor, weight: Tensor | None, dtype: torch.dtype, *rest: Any, **options: Any
) -> None:
    types = {"WIDE": TYPES[keys.wide_of(score, weight)], "NUMBER": TYPES[dtype], "BLOCK": BLOCK}
    if programs:
        with torch.cuda.device_of(score):
            kernel[(programs,)](score, weight, *rest, **types, **options, num_warps=WARPS)


def _each(scores: Sequence[Tensor], weights: Sequence[Tensor] | None) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    for i, score in enumerate(scores):
        yield i, score, None if weights is None else weights[i]


def _spans(score: Tensor) -> int:
    return -(-score.numel() // SPAN)


def histogram(
    scores: Sequence[Tensor],
    weights: Sequence[Tensor] | None,
    dtype: torch.dtype,
    prefix: Tensor | None,
    shift: int,
    bits: int,
) -> tuple[Tensor, Tensor]:
    """See ``portable.histogram``."""
    counts = torch.zeros(2**bits, dtype=torch.int64, device=scores[0].device)
    nan = torch.zeros(len(scores), dtype=torch.int32, device=scores[0].device)
    for i, score, weight in _each(scores, weights):
        _launch(
            histogram_kernel, _spans(score), score, weight, dtype, score.numel(), prefix, counts, nan[i:],
            SHIFT=shift, BITS=bits, FIRST=prefix is None, INFINITY=INFINITY[dtype], SPAN=SPAN,
        )  # fmt: skip
    return counts, nan


def ties(scores: Sequence[Tensor], weights: Sequence[Tensor] | None, dtype: torch.dtype, key: Tensor) -> Tensor:
    """See ``portable.ties``."""
    spans = [_spans(s) for s in scores]
    counts = torch.empty(sum(spans), dtype=torch.int64, device=scores[0].device)
    for (_, score, weight), part in zip(_each(scores, weights), counts.split(spans), strict=True):
        _launch(ties_kernel, _spans(score), score, weight, dtype, score.numel(), key, part, SPAN=SPAN)
    return counts


def rows(score: Tensor, weight: Tensor | None, dtype: torch.dtype, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """See ``portable.rows``."""
    key, cut = torch.empty(2, len(score), dtype=torch.int64, device=score.device)
    nan = torch.zeros(1, dtype=torch.int32, device=score.device)
    _launch(
        rows_kernel, len(score), score, weight, dtype, score.shape[1], k, key, cut, nan,
        WIDTH=keys.bits_of(dtype), BITS=ROW_BITS, INFINITY=INFINITY[dtype],
    )  # fmt: skip
    return key, cut, nan[0]


def write(score: Tensor, weight: Tensor | None, dtype: torch.dtype, key: Tensor, cut: Tensor) -> Tensor:
    """See ``portable.write``."""
    n = score.numel()
    mask = torch.empty((n + 7) // 8, dtype=torch.uint8, device=score.device)
    _launch(
        write_kernel, -(-n // BLOCK), score, weight, dtype, n, score.shape[1], key, cut, mask, ONE_ROW=len(score) == 1
    )
    return mask
