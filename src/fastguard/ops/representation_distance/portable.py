"""``representation_distance`` in plain PyTorch, by tiles of rows.

A cosine is half the squared distance of the two unit vectors, not 1 minus a quotient: nothing cancels where they
are nearly parallel. Their difference p x - q y is taken as p (x - y) + (p - q) y, so that where the rows are equal
both distance and gradient are 0 to the bit, on every backend.

Shapes: L layers, N rows, D features, R rows of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastguard.ops.precision import accumulation_dtype

TILE_ELEMENTS = {"cpu": 2**17, "other": 2**22}
"""Most elements of a tile: what stays in a CPU's cache, what fills a GPU."""


def tiles(a: Tensor, b: Tensor, mask: Tensor | None) -> Iterator[tuple[int, slice | Tensor, Tensor, Tensor]]:
    """(layer, its rows, their features in a and in b, [R, D] in the accumulation dtype) over all rows that count."""
    layers, n, width = a.shape
    wide = accumulation_dtype(a.dtype)
    step = max(1, TILE_ELEMENTS.get(a.device.type, TILE_ELEMENTS["other"]) // max(width, 1))
    kept = None if mask is None else mask.nonzero()[:, 0]
    count = n if kept is None else kept.shape[0]
    for layer in range(layers):
        for start in range(0, count, step):
            stop = min(start + step, count)
            rows = slice(start, stop) if kept is None else kept[start:stop]
            yield layer, rows, a[layer, rows].to(wide), b[layer, rows].to(wide)


def difference(x: Tensor, y: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """p x - q y of rows x, y [R, D] and their factors p, q [R]."""
    return p[:, None] * (x - y) + (p - q)[:, None] * y


def forward(a: Tensor, b: Tensor, mask: Tensor | None, cosine: bool) -> tuple[Tensor, Tensor]:
    """(distance [L, N], inverse norms of a and b [2, L, N] or, without cosine, [0, L, N]); fp32 or float64.

    a, b: [L, N, D]. mask: [N] bool or None. Both inverse norms of a row are 0 where either of its two rows is zero.
    """
    layers, n, _ = a.shape
    wide = accumulation_dtype(a.dtype)
    distance = torch.zeros(layers, n, dtype=wide, device=a.device)
    inverse = torch.zeros(2 if cosine else 0, layers, n, dtype=wide, device=a.device)
    for layer, rows, x, y in tiles(a, b, mask):
        if not cosine:
            distance[layer, rows] = torch.linalg.vector_norm(x - y, dim=-1)
            continue
        norm_a, norm_b = torch.linalg.vector_norm(x, dim=-1), torch.linalg.vector_norm(y, dim=-1)
        dead = (norm_a == 0) | (norm_b == 0)
        p, q = torch.where(dead, 0, 1 / norm_a), torch.where(dead, 0, 1 / norm_b)
        half = difference(x, y, p, q).square_().sum(-1) / 2
        distance[layer, rows] = torch.where(dead, 1, half)
        inverse[0, layer, rows], inverse[1, layer, rows] = p, q
    return distance, inverse


def backward(
    grad: Tensor, a: Tensor, b: Tensor, mask: Tensor | None, distance: Tensor, inverse: Tensor, cosine: bool
) -> Tensor:
    """da [L, N, D], contiguous, in the dtype of a. grad, distance: [L, N] in the accumulation dtype.

    l2: grad / distance * (a - b). cosine, with unit vectors u and v: grad / |a| * (u - v - distance * u).
    """
    da = (torch.zeros if mask is not None else torch.empty)(a.shape, dtype=a.dtype, device=a.device)
    for layer, rows, x, y in tiles(a, b, mask):
        g, d = grad[layer, rows], distance[layer, rows]
        if cosine:
            p, q = inverse[0, layer, rows], inverse[1, layer, rows]
            out = (g * p)[:, None] * (difference(x, y, p, q) - (d * p)[:, None] * x)
        else:
            out = torch.where(d == 0, 0, g / d)[:, None] * (x - y)
        da[layer, rows] = out.to(a.dtype)
    return da
