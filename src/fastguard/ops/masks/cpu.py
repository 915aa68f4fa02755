"""Packed masks on CPU: csrc/cpu/masks.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from fastguard import _extension

_extension.load()


def pack(mask: Tensor) -> Tensor:
    """See ``portable.pack``."""
    packed = torch.empty((mask.numel() + 7) // 8, dtype=torch.uint8)
    torch.ops.fastguard_c.masks_pack(mask, packed)
    return packed


def unpack(packed: Tensor, n: int) -> Tensor:
    """See ``portable.unpack``."""
    mask = torch.empty(n, dtype=torch.bool)
    torch.ops.fastguard_c.masks_unpack(packed, mask)
    return mask


def apply_(entries: Tensor, packed: Tensor, value: Tensor | None) -> None:
    """See ``portable.apply_``."""
    torch.ops.fastguard_c.masks_apply(entries, packed, value)


def count(packed: Tensor) -> Tensor:
    """See ``portable.count``."""
    return torch.tensor(torch.ops.fastguard_c.masks_count(packed))
