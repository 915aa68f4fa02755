"""``threshold_select`` on CPU: csrc/cpu/threshold_select.cpp, blocks of keys in cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastguard import _extension
from fastguard.ops.threshold_select.portable import BITS, SPAN

__all__ = ["BITS", "histogram", "rows", "ties", "write"]

_extension.load()


def histogram(
    scores: Sequence[Tensor],
    weights: Sequence[Tensor] | None,
    dtype: torch.dtype,
    prefix: Tensor | None,
    shift: int,
    bits: int,
) -> tuple[Tensor, Tensor]:
    """See ``portable.histogram``."""
    counts, nan = torch.zeros(2**bits, dtype=torch.int64), torch.zeros(len(scores), dtype=torch.uint8)
    of = None if prefix is None else int(prefix)
    torch.ops.fastguard_c.threshold_select_histogram(scores, weights or [], dtype, of, shift, bits, counts, nan)
    return counts, nan


def ties(scores: Sequence[Tensor], weights: Sequence[Tensor] | None, dtype: torch.dtype, key: Tensor) -> Tensor:
    """See ``portable.ties``."""
    counts = torch.empty(sum(-(-s.numel() // SPAN) for s in scores), dtype=torch.int64)
    torch.ops.fastguard_c.threshold_select_ties(scores, weights or [], dtype, int(key), counts)
    return counts


def rows(score: Tensor, weight: Tensor | None, dtype: torch.dtype, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """See ``portable.rows``."""
    key, cut = torch.empty(2, len(score), dtype=torch.int64)
    nan = torch.zeros((), dtype=torch.uint8)
    torch.ops.fastguard_c.threshold_select_rows(score, weight, dtype, k, key, cut, nan)
    return key, cut, nan


def write(score: Tensor, weight: Tensor | None, dtype: torch.dtype, key: Tensor, cut: Tensor) -> Tensor:
    """See ``portable.write``."""
    mask = torch.empty((score.numel() + 7) // 8, dtype=torch.uint8)
    torch.ops.fastguard_c.threshold_select_write(score, weight, dtype, key, cut, mask)
    return mask
