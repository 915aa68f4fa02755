"""Packed masks in plain PyTorch, a piece at a time, so that no temporary is larger than a piece.

The functions of every backend take contiguous tensors on one device, checked by ``op.py``; entries of weights come as
the integers of their bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

PIECE = 2**22
"""Entries that are worked on at a time."""


def _places(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


def pack(mask: Tensor) -> Tensor:
    """[ceil(n / 8)] uint8 of a flat boolean mask [n]."""
    packed = torch.zeros((mask.numel() + 7) // 8, dtype=torch.uint8, device=mask.device)
    for piece, out in zip(mask.split(PIECE), packed.split(PIECE // 8), strict=False):
        whole = torch.nn.functional.pad(piece.to(torch.uint8), (0, -piece.numel() % 8)).view(-1, 8)
        out.copy_((whole << _places(mask.device)).sum(1, dtype=torch.uint8))
    return packed


def unpack(packed: Tensor, n: int) -> Tensor:
    """[n] booleans."""
    mask = torch.empty(n, dtype=torch.bool, device=packed.device)
    for out, piece in zip(mask.split(PIECE), packed.split(PIECE // 8), strict=False):
        bits = piece[:, None] >> _places(packed.device) & 1
        out.copy_(bits.view(-1)[: out.numel()])
    return mask


def apply_(entries: Tensor, packed: Tensor, value: Tensor | None) -> None:
    """Flat integers [n]: 0, or those of value [n], where a bit is set."""
    values = [None] * ((entries.numel() + PIECE - 1) // PIECE) if value is None else value.split(PIECE)
    for to, piece, given in zip(entries.split(PIECE), packed.split(PIECE // 8), values, strict=False):
        chosen = unpack(piece, to.numel())
        if given is None:
            to.masked_fill_(chosen, 0)
        else:
            torch.where(chosen, given, to, out=to)


def count(packed: Tensor) -> Tensor:
    """How many bits are set, 0-dim int64."""
    total = torch.zeros((), dtype=torch.int64, device=packed.device)
    for piece in packed.split(PIECE):
        pairs = piece - (piece >> 1 & 0x55)
        fours = (pairs & 0x33) + (pairs >> 2 & 0x33)
        total += ((fours + (fours >> 4)) & 0x0F).sum()
    return total
