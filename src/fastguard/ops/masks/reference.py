"""The specification of packed masks, bit by bit in Python: entry i of the flat mask is bit i % 8 of byte i // 8."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(mask: Tensor) -> Tensor:
    """[ceil(n / 8)] uint8 of n booleans; the bits behind the last entry are 0."""
    packed = [0] * ((mask.numel() + 7) // 8)
    for i, chosen in enumerate(mask.flatten().tolist()):
        packed[i // 8] |= chosen << (i % 8)
    return torch.tensor(packed, dtype=torch.uint8)


def unpack(packed: Tensor, n: int) -> Tensor:
    """[n] booleans."""
    data = packed.tolist()
    return torch.tensor([bool(data[i // 8] >> (i % 8) & 1) for i in range(n)], dtype=torch.bool)


def apply(weight: Tensor, mask: Tensor, value: Tensor | None) -> Tensor:
    """The weight with 0, or value's entries, where the boolean mask is set."""
    return torch.where(mask, torch.zeros_like(weight) if value is None else value, weight)
