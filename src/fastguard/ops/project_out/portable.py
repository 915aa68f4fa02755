"""``project_out`` in plain PyTorch, by tiles of rows.

Shapes: N rows, D features, G bases of K directions; index [N / each] gives the basis of ``each`` consecutive rows, -1
for none.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastguard.ops.precision import accumulation_dtype

TILE_ELEMENTS = {"cpu": 2**17, "other": 2**22}
"""Most elements of a tile: what stays in a CPU's cache, what fills a GPU."""


def tiles(x: Tensor) -> Iterator[slice]:
    """Slices of the rows of x [N, D]."""
    step = max(1, TILE_ELEMENTS.get(x.device.type, TILE_ELEMENTS["other"]) // max(x.shape[1], 1))
    for start in range(0, x.shape[0], step):
        yield slice(start, min(start + step, x.shape[0]))


def index_of(index: Tensor | None, rows: slice, n: int) -> Tensor | None:
    """The basis of each row of a tile of the n rows."""
    if index is None:
        return None
    return index[torch.arange(rows.start, rows.stop, device=index.device) // (n // index.shape[0])].long()


def products(x: Tensor, basis: Tensor, index: Tensor | None) -> Tensor:
    """x Q^T [R, K] of rows x [R, D], each with its own basis; 0 for a row without."""
    if index is None:
        return x @ basis[0].mT
    every = x @ basis.flatten(0, 1).mT  # [R, G K]: G is small, a gathered [R, K, D] would not be
    own = every.view(x.shape[0], *basis.shape[:2])
    return torch.where((index < 0)[:, None], 0, own[torch.arange(x.shape[0], device=x.device), index.clamp(min=0)])


def combined(c: Tensor, basis: Tensor, index: Tensor | None) -> Tensor:
    """c Q [R, D] of coefficients c [R, K]; 0 for a row without a basis."""
    if index is None:
        return c @ basis[0]
    spread = c.new_zeros(c.shape[0], *basis.shape[:2])
    spread[torch.arange(c.shape[0], device=c.device), index.clamp(min=0)] = torch.where((index < 0)[:, None], 0, c)
    return spread.flatten(1) @ basis.flatten(0, 1)


def rest(x: Tensor, basis: Tensor, index: Tensor | None, scale: float) -> Tensor:
    """x - scale (x Q^T) Q of rows [R, D] in the accumulation dtype."""
    return x - combined(products(x, basis, index) * scale, basis, index)


def _lengths(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """(1 / |z|, |x|) [R, 1] of rows and what is left of them; the first is 0 where nothing is left."""
    left = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    return torch.where(left == 0, 0, 1 / left), torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def forward(x: Tensor, basis: Tensor, index: Tensor | None, scale: float, preserve: bool, out: Tensor) -> None:
    """Write the rows of x [N, D] without their part in the basis [G, K, D] to ``out`` [N, D], which may be x."""
    wide = accumulation_dtype(x.dtype)
    for rows in tiles(x):
        own = index_of(index, rows, x.shape[0])
        tile = x[rows].to(wide)
        z = rest(tile, basis, own, scale)
        if preserve:
            inverse, length = _lengths(tile, z)
            kept = z * (inverse * length)
            z = kept if own is None else torch.where((own < 0)[:, None], tile, kept)
        out[rows] = z.to(out.dtype)


def rest_gradient(grad: Tensor, x: Tensor, z: Tensor, own: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the gradient at z |x| / |z| is at z, and what of it goes to x through |x|; rows [R, D]."""
    inverse, length = _lengths(x, z)
    unit = z * inverse
    along = (unit * grad).sum(-1, keepdim=True)
    at_z = (length * inverse) * (grad - along * unit)
    through = torch.where(length == 0, 0, along / length) * x
    if own is not None:
        none = (own < 0)[:, None]
        at_z, through = torch.where(none, grad, at_z), torch.where(none, 0, through)
    return at_z, through


def backward(grad: Tensor, x: Tensor, basis: Tensor, index: Tensor | None, scale: float, dx: Tensor) -> None:
    """Write to ``dx`` [N, D] the gradient of the norm-preserving form; grad: [N, D] in any dtype.

    (The other form's is ``forward`` of the gradient.)
    """
    wide = accumulation_dtype(x.dtype)
    for rows in tiles(x):
        own = index_of(index, rows, x.shape[0])
        tile = x[rows].to(wide)
        at_z, through = rest_gradient(grad[rows].to(wide), tile, rest(tile, basis, own, scale), own)
        dx[rows] = (rest(at_z, basis, own, scale) + through).to(dx.dtype)


def basis_gradient(
    grad: Tensor, x: Tensor, basis: Tensor, index: Tensor | None, scale: float, preserve: bool
) -> Tensor:
    """The gradient at the basis [G, K, D], in its dtype: -scale ((g Q^T)^T x + (x Q^T)^T g), g the gradient at z."""
    wide = accumulation_dtype(x.dtype)
    total = torch.zeros_like(basis)
    for rows in tiles(x):
        own = index_of(index, rows, x.shape[0])
        tile, at_z = x[rows].to(wide), grad[rows].to(wide)
        c = products(tile, basis, own)
        if preserve:
            at_z, _ = rest_gradient(at_z, tile, tile - combined(c * scale, basis, own), own)
        e = products(at_z, basis, own)
        if own is None:
            total[0] += e.mT @ tile + c.mT @ at_z
        else:
            spread = c.new_zeros(2, c.shape[0], *basis.shape[:2])
            rows_of_tile = torch.arange(c.shape[0], device=c.device)
            spread[0, rows_of_tile, own.clamp(min=0)] = e  # 0 for a row without a basis
            spread[1, rows_of_tile, own.clamp(min=0)] = c
            total += (spread[0].flatten(1).mT @ tile + spread[1].flatten(1).mT @ at_z).view_as(total)
    return total.mul_(-scale)
