"""``representation_distance`` on CPU: csrc/cpu/representation_distance.cpp, row by row."""

from __future__ import annotations

import torch
from torch import Tensor

from fastguard import _extension
from fastguard.ops.precision import accumulation_dtype

_extension.load()


def forward(a: Tensor, b: Tensor, mask: Tensor | None, cosine: bool) -> tuple[Tensor, Tensor]:
    """See ``portable.forward``."""
    layers, n, _ = a.shape
    wide = accumulation_dtype(a.dtype)
    distance = torch.empty(layers, n, dtype=wide)
    inverse = torch.empty(2 if cosine else 0, layers, n, dtype=wide)
    torch.ops.fastguard_c.representation_distance(a, b, mask, cosine, distance, inverse)
    return distance, inverse


def backward(
    grad: Tensor, a: Tensor, b: Tensor, mask: Tensor | None, distance: Tensor, inverse: Tensor, cosine: bool
) -> Tensor:
    """See ``portable.backward``."""
    da = torch.empty(a.shape, dtype=a.dtype)
    torch.ops.fastguard_c.representation_distance_backward(grad, a, b, mask, distance, inverse, cosine, da)
    return da
