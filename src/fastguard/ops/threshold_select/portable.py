"""``threshold_select`` in plain PyTorch, a piece at a time.

The functions of every backend take contiguous tensors on one device, checked by ``op.py``; weights, where given, have
the shapes of the scores. ``dtype`` is what all numbers are compared in; keys are those of ``keys.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastguard.ops.masks import portable as masks
from fastguard.ops.threshold_select import keys

BITS = 16
"""Of a digit of ``histogram``."""

SPAN = 2**16
"""Entries whose ties are counted together; the same for every backend."""

PIECE = 2**22
"""Entries that are worked on at a time: keys of 16 MB in fp32. A multiple of SPAN and of 8."""

ROW_BITS = 8


def _pieces(scores: Sequence[Tensor], weights: Sequence[Tensor] | None) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """(i, piece of the i-th score, the same piece of its weight), flat."""
    for i, score in enumerate(scores):
        whole = score.view(-1)
        weight = None if weights is None else weights[i].view(-1)
        for start in range(0, whole.numel(), PIECE):
            part = slice(start, start + PIECE)
            yield i, whole[part], None if weight is None else weight[part]


def histogram(
    scores: Sequence[Tensor],
    weights: Sequence[Tensor] | None,
    dtype: torch.dtype,
    prefix: Tensor | None,
    shift: int,
    bits: int,
) -> tuple[Tensor, Tensor]:
    """How often each digit occurs behind a prefix, and in which tensors there are NaNs.

    prefix: 0-dim int64, what the keys of interest are when shifted by shift + bits; None for the first digit.

    Returns:
        [2^bits] int64, of the bits of keys from ``shift`` on, in ascending order of the keys; [tensors] bool, of the
        first digit's pass (else whatever).
    """
    counts = torch.zeros(2**bits, dtype=torch.int64, device=scores[0].device)
    nan = torch.zeros(len(scores), dtype=torch.bool, device=scores[0].device)
    for i, score, weight in _pieces(scores, weights):
        number = keys.numbers(score, weight, dtype)
        key = keys.encode(number)
        if prefix is None:  # the sign's digit
            nan[i] |= number.isnan().any()
            digit = (key >> shift).int() + 2 ** (bits - 1)
        else:
            digit = (key[(key >> (shift + bits)) == prefix] >> shift).int() & (2**bits - 1)
        counts += torch.bincount(digit, minlength=2**bits)
    return counts, nan


def ties(scores: Sequence[Tensor], weights: Sequence[Tensor] | None, dtype: torch.dtype, key: Tensor) -> Tensor:
    """How many keys equal ``key`` (0-dim int64): int64, for each span of each tensor, one tensor after the other."""
    counts = []
    for _, score, weight in _pieces(scores, weights):
        equal = keys.encode(keys.numbers(score, weight, dtype)) == key
        counts.append(torch.nn.functional.pad(equal, (0, -equal.numel() % SPAN)).view(-1, SPAN).sum(1))
    return torch.cat(counts) if counts else torch.zeros(0, dtype=torch.int64, device=scores[0].device)


def rows(score: Tensor, weight: Tensor | None, dtype: torch.dtype, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row of score [R, C] the k-th largest key (0 <= k <= C), and up to where ties with it are chosen.

    Returns:
        [R] int64; [R] int64, the column from which on a tie is too many; 0-dim bool, whether there is a NaN.
    """
    found = [
        _rows(score[r], None if weight is None else weight[r], dtype, k) for r in _row_blocks(score.shape, multiple=1)
    ]
    key, cut, nan = (torch.stack(x) if x[0].dim() == 0 else torch.cat(x) for x in zip(*found, strict=True))
    return key, cut, nan.any()


def _row_blocks(shape: Sequence[int], multiple: int) -> Iterator[slice]:
    """Blocks of a multiple of so many rows, of at most about a piece of entries, or of bins."""
    step = max(PIECE // max(shape[1], 2**ROW_BITS) // multiple, 1) * multiple
    for start in range(0, shape[0], step):
        yield slice(start, start + step)


def _rows(score: Tensor, weight: Tensor | None, dtype: torch.dtype, k: int) -> tuple[Tensor, Tensor, Tensor]:
    number = keys.numbers(score, weight, dtype)
    key = keys.encode(number)
    n, bins = len(key), 2**ROW_BITS
    offset = torch.arange(0, n * bins, bins, device=key.device)[:, None]
    alive = torch.ones_like(key, dtype=torch.bool)
    missing = torch.full((n, 1), k, device=key.device)
    prefix = torch.zeros(n, 1, dtype=torch.int64, device=key.device)
    for shift in range(keys.bits_of(dtype) - ROW_BITS, -1, -ROW_BITS):
        first = shift == keys.bits_of(dtype) - ROW_BITS
        digit = (key >> shift).long() + bins // 2 if first else (key >> shift).long() & (bins - 1)
        counts = torch.bincount((digit + offset)[alive], minlength=n * bins).view(n, bins)
        above = counts.flip(1).cumsum(1)
        place = torch.searchsorted(above, missing).clamp_(max=bins - 1)
        chosen = bins - 1 - place
        missing = missing - (above.gather(1, place) - counts.gather(1, chosen))
        alive &= digit == chosen
        prefix = chosen - bins // 2 if first else prefix * bins + chosen
    cut = (alive.cumsum(1) < missing).sum(1) + 1
    return prefix[:, 0], cut, number.isnan().any()


def write(score: Tensor, weight: Tensor | None, dtype: torch.dtype, key: Tensor, cut: Tensor) -> Tensor:
    """The packed mask of score [R, C]: keys above key [R], and those equal to it in columns before cut [R]."""
    packed = []
    if len(score) == 1:
        for i, (_, s, w) in enumerate(_pieces([score], None if weight is None else [weight])):
            packed.append(_write(s[None], None if w is None else w[None], dtype, key, cut - i * PIECE))
    else:
        for r in _row_blocks(score.shape, multiple=8):  # whole bytes
            packed.append(_write(score[r], None if weight is None else weight[r], dtype, key[r], cut[r]))
    return torch.cat(packed) if packed else torch.zeros(0, dtype=torch.uint8, device=score.device)


def _write(score: Tensor, weight: Tensor | None, dtype: torch.dtype, key: Tensor, cut: Tensor) -> Tensor:
    own = keys.encode(keys.numbers(score, weight, dtype))
    before = torch.arange(own.shape[1], device=own.device) < cut[:, None]
    return masks.pack(((own > key[:, None]) | ((own == key[:, None]) & before)).view(-1))
