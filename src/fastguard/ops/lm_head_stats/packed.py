"""A head as the CPU's library of products keeps it, packed once for the many tiles of a lens.

A product of one tile spends a quarter of its time on bringing the head into the library's own order, for every tile
anew. Who reads many hidden states with one head says that it stays as it is (`constant`); then it is packed as soon as
it has been read for AFTER tiles. The copy, up to three times as large as the head, goes with `release`.

Only fp32 heads, which alone are packed so (by MKL), and none larger than LARGEST.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fastguard.ops.lm_head_stats.op import TILE

AFTER = 4
"""Packing costs as much as the product of one tile, and saves a quarter of each."""

LARGEST = 2**28
"""Bytes of a head that is packed at most."""

_heads: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Of each constant head: for how many tiles it was read, or its packed copy."""


def constant(weight: Tensor) -> None:
    """Promise that nothing writes to ``weight`` [V, D] before it is released."""
    if torch.compiler.is_compiling():
        return
    packable = weight.device.type == "cpu" and weight.dtype == torch.float32 and hasattr(torch.ops.mkl, "_mkl_linear")
    if packable and type(weight) is Tensor and weight.numel() * weight.element_size() <= LARGEST:
        _heads[weight] = 0


def release(weight: Tensor) -> None:
    """Take the promise back, and let go of the packed copy."""
    if not torch.compiler.is_compiling():
        _heads.pop(weight, None)


def product(x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """x @ weight^T [R, V] of at most TILE rows [R, D]: in ``out``, or of a packed head, whose product makes its own."""
    found = _heads.get(weight)
    if found is None or 2 * len(x) <= TILE:  # it is packed for TILE rows and no others; few are not worth padding
        return torch.mm(x, weight.t(), out=out)
    if not isinstance(found, Tensor):
        _heads[weight] = found + 1
        if found < AFTER:
            return torch.mm(x, weight.t(), out=out)
        found = _heads[weight] = torch.ops.mkl._mkl_reorder_linear_weight(weight.contiguous(), TILE)
    rows = torch.nn.functional.pad(x, (0, 0, 0, TILE - len(x)))
    return torch.ops.mkl._mkl_linear(rows, found, weight, None, TILE)[: len(x)]  # type: ignore[no-any-return]
