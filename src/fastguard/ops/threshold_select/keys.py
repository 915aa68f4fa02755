"""Floats as integers of the same order, so that digits of the k-th largest can be found one after the other.

A float is a sign and a magnitude; its key is that number in two's complement, of the width of the float. Keys are in
the order of the floats, and 0.0 and -0.0, which are equal, have one key. NaNs lie beyond the infinities.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

INTEGERS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


def wide_of(*tensors: Tensor | None) -> torch.dtype:
    """Float64 if any tensor is, else fp32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def dtype_of(scores: Sequence[Tensor], weights: Sequence[Tensor] | None) -> torch.dtype:
    """The narrowest dtype that holds everything that is compared."""
    if weights is None and len({s.dtype for s in scores}) == 1:
        return scores[0].dtype
    return wide_of(*scores, *(weights or ()))


def bits_of(dtype: torch.dtype) -> int:
    """The width of a key."""
    return 8 * dtype.itemsize


def numbers(score: Tensor, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What is compared, in ``dtype``: the score, or |weight| * score rounded to fp32 (float64 if one of them is)."""
    if weight is not None:
        wide = wide_of(score, weight)
        score = weight.to(wide).abs() * score.to(wide)
    return score.to(dtype)


def encode(number: Tensor) -> Tensor:
    """The keys of numbers."""
    bits = number.view(INTEGERS[number.dtype])
    magnitude = bits & torch.iinfo(bits.dtype).max
    return torch.where(bits < 0, -magnitude, magnitude)


def decode(key: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers of keys (int64), in float64 or fp32."""
    integer = INTEGERS[dtype]
    sign = torch.where(key < 0, torch.iinfo(integer).min, 0)
    number = (key.abs() | sign).to(integer).view(dtype)
    return number if dtype == torch.float64 else number.float()
