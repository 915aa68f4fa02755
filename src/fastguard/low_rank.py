"""The largest singular values of a matrix and their vectors, by products with it alone.

The randomised range finder with subspace iteration of Halko, Martinsson and Tropp (2011), arXiv 0909.4061. What is
decomposed may be a tensor, or two functions that multiply with it: the difference of two models' weights is then never
formed in a wider dtype than theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

OVERSAMPLED = 16
"""Directions beside those asked for that the range finder follows."""
PASSES = 4
"""Of the subspace iteration: what is missed falls by the ninth power of how the singular values fall."""
TILE_ELEMENTS = 2**22
"""Of a difference, made at a time."""


@dataclass(frozen=True)
class Products:
    """A matrix M [m, n] known by its products.

    times: y [n, k] to M y [m, k]. transposed: y [m, k] to M^T y [n, k]. dtype, device: of both.
    """

    shape: tuple[int, int]
    times: Callable[[Tensor], Tensor]
    transposed: Callable[[Tensor], Tensor]
    dtype: torch.dtype
    device: torch.device


def difference(a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> Products:
    """The products with a - b, matrices [m, n] of any dtypes on one device; made a few rows at a time in ``dtype``.

    dtype: of the arithmetic; fp32 if None, float64 where one of them is.

    Raises ValueError if they are no matrices of one shape.
    """
    if a.dim() != 2 or a.shape != b.shape:
        raise ValueError(f"b: expected a matrix of the shape of a, {list(a.shape)}, got {list(b.shape)}")
    wide = dtype or torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    step = max(1, TILE_ELEMENTS // max(a.shape[1], 1))

    def tile(start: int) -> Tensor:
        return a[start : start + step].to(wide) - b[start : start + step].to(wide)

    def times(y: Tensor) -> Tensor:
        return torch.cat([tile(start) @ y for start in range(0, a.shape[0], step)])

    def transposed(y: Tensor) -> Tensor:
        out = y.new_zeros(a.shape[1], y.shape[1])
        for start in range(0, a.shape[0], step):
            out.addmm_(tile(start).mT, y[start : start + step])
        return out

    return Products((a.shape[0], a.shape[1]), times, transposed, wide, a.device)


def range_finder(matrix: Tensor | Products, width: int, *, passes: int = PASSES, seed: int = 0) -> Tensor:
    """Orthonormal columns Q [m, width] that span nearly what the largest ``width`` singular values do.

    Args:
        matrix: [m, n], fp32 or float64, or its products. width: at most min(m, n).
        passes: of the subspace iteration, two products each. seed: of the test matrix, drawn on the CPU.
    """
    m = _products(matrix)
    g = torch.Generator().manual_seed(seed)
    test = torch.randn(m.shape[1], width, generator=g, dtype=m.dtype).to(m.device)
    q = torch.linalg.qr(m.times(test))[0]
    for _ in range(passes):
        q = torch.linalg.qr(m.times(torch.linalg.qr(m.transposed(q))[0]))[0]
    return q


def top_svd(matrix: Tensor | Products, k: int, *, passes: int = PASSES, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(U [m, k], S [k] descending, Vh [k, n]): the k largest singular values of a matrix and their vectors.

    Exact to rounding for a matrix of rank at most k + ``OVERSAMPLED``, and where that is no smaller than half of the
    matrix, whose whole decomposition is then taken. Else a singular value s_i is found within
    3 s_i (s_c / s_i)^(4 passes + 2) where s_c is the first that was not followed; a flat spectrum wants more passes.
    Vectors are orthonormal to 1e-6 in fp32.

    Args:
        matrix: [m, n], fp32 or float64, or its products. k: at most min(m, n).
        passes: of the subspace iteration. seed: the same numbers for the same seed.

    Raises ValueError that names the argument.
    """
    m = _products(matrix)
    least = min(m.shape)
    if not 0 <= k <= least:
        raise ValueError(f"k: expected 0 to {least}, the lesser side of {list(m.shape)}, got {k}")
    width = k + OVERSAMPLED
    if 2 * width >= least:
        u, s, vh = torch.linalg.svd(matrix if isinstance(matrix, Tensor) else _formed(matrix), full_matrices=False)
        return u[:, :k], s[:k], vh[:k]
    q = range_finder(m, width, passes=passes, seed=seed)
    # few numbers: in float64, since LAPACK's fp32 vectors are orthonormal to no better than 2e-6
    u, s, vh = torch.linalg.svd(m.transposed(q).mT.double(), full_matrices=False)
    return q @ u[:, :k].to(q), s[:k].to(q), vh[:k].to(q)


def best_part(matrix: Tensor, rank: int, seed: int = 0) -> Tensor:
    """The matrix [m, n] of at most this rank that is nearest to ``matrix``; itself where that is its rank."""
    if rank >= min(matrix.shape):
        return matrix
    u, s, vh = top_svd(matrix, rank, seed=seed)
    return (u * s) @ vh


def _products(matrix: Tensor | Products) -> Products:
    if isinstance(matrix, Products):
        return matrix
    if matrix.dim() != 2 or matrix.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"matrix: expected [m, n] in float32 or float64, got {matrix.dtype} {list(matrix.shape)}")
    return Products(
        (matrix.shape[0], matrix.shape[1]), matrix.__matmul__, matrix.mT.__matmul__, matrix.dtype, matrix.device
    )


def _formed(m: Products) -> Tensor:
    """The matrix itself, from its product with the narrower identity."""
    if m.shape[0] < m.shape[1]:
        return m.transposed(torch.eye(m.shape[0], dtype=m.dtype, device=m.device)).mT
    return m.times(torch.eye(m.shape[1], dtype=m.dtype, device=m.device))
