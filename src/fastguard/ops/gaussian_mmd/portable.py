"""``gaussian_mmd`` in torch, a block of features at a time: any device, no compiler.

Shapes: L layers, B samples, F features, P pooled rows (samples, then noise: 2B).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastguard.ops.philox import gaussian_noise

BLOCK = 16384
"""Features made and read at a time; a multiple of 4."""


def _pooled(
    x: Tensor, mask: Tensor | None, noise: Tensor | None, call: Tensor, seed: int, layer: int, sample_offset: int
) -> Iterator[tuple[int, slice, Tensor]]:
    """(layer, features, masked pooled rows [P, at most BLOCK]) over all layers and blocks of features."""
    layers, b, features = x.shape
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    for i in range(layers):
        for start in range(0, features, BLOCK):
            part = slice(start, min(start + BLOCK, features))
            if noise is None:
                z = gaussian_noise(
                    b, part.stop - start, seed=seed, call=call.to(x.device), layer=layer + i,
                    sample_offset=sample_offset, first=start, dtype=wide,
                )  # fmt: skip
            else:
                z = noise[i, :, part].to(wide)
            rows = torch.cat([x[i, :, part].to(wide), z])
            if mask is not None:
                entry = torch.arange(start, part.stop, device=x.device) // (features // mask.shape[1])
                rows = rows * mask[:, entry].repeat(2, 1)
            yield i, part, rows


def gram(
    x: Tensor, mask: Tensor | None, noise: Tensor | None, call: Tensor, seed: int, layer: int, sample_offset: int
) -> Tensor:
    """Gram matrices [L, P, P] of the masked pooled rows."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = torch.zeros(x.shape[0], 2 * x.shape[1], 2 * x.shape[1], dtype=wide, device=x.device)
    for i, _, rows in _pooled(x, mask, noise, call, seed, layer, sample_offset):
        out[i].addmm_(rows, rows.t())
    return out


def combine(
    weights: Tensor, x: Tensor, mask: Tensor | None, noise: Tensor | None, call: Tensor, seed: int, layer: int,
    sample_offset: int,
) -> Tensor:  # fmt: skip
    """weights [L, B, P] @ masked pooled rows: [L, B, F] in the dtype of x; noise is remade."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for i, part, rows in _pooled(x, mask, noise, call, seed, layer, sample_offset):
        mine = weights[i] @ rows
        if mask is not None:
            entry = torch.arange(part.start, part.stop, device=x.device) // (x.shape[2] // mask.shape[1])
            mine = mine * mask[:, entry]
        out[i, :, part] = mine.to(x.dtype)
    return out
