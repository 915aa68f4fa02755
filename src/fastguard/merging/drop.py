"""Which weights are kept, by chance and yet for ever: Philox counters of (seed, model, tensor, place)."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from fastguard.ops.philox import MASK, philox4x32

WORDS = 4
"""Of a counter; one a weight."""


def keep(count: int, at: int, density: float | Tensor, *, seed: int, tensor: str, model: int) -> Tensor:
    """Boolean [count]: weights ``at`` .. of a tensor, each true with probability ``density`` to 2^-32.

    ``density`` is one number, or float64 [count].

    A function of its arguments alone: a merge that was interrupted draws the same again, in portions of any size.

    Raises ValueError where ``at`` is no multiple of 4.
    """
    if at % WORDS:
        raise ValueError(f"at: expected a multiple of {WORDS}, got {at}")
    first, last = at // WORDS, -(-(at + count) // WORDS)
    place = torch.arange(first, last)
    name = int.from_bytes(hashlib.sha256(tensor.encode()).digest()[:8], "little")
    rest = (torch.tensor([word]) for word in (model, name & MASK, name >> 32))
    c1, c2, c3 = rest
    words = torch.stack(philox4x32((place, c1, c2, c3), seed), dim=1).view(-1)[:count]
    return words < (density * 2**32).round() if isinstance(density, Tensor) else words < round(density * 2**32)
