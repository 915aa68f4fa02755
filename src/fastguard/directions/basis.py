"""From directions to an orthonormal basis, once, in float64; what ``project_out`` and its kin read."""

from __future__ import annotations

import torch
from torch import Tensor


def orthonormalise(directions: Tensor) -> Tensor:
    """The orthonormal basis that Gram-Schmidt makes of ``directions``, in their order.

    Row k of the result is what is left of direction k without the directions before it, of length 1: the first is the
    first direction's unit vector, and the first k rows span what the first k directions span. By Householder
    reflections in float64 whatever the dtype given, so that rows are orthogonal however close the directions are.
    Differentiable.

    Args:
        directions: [K, D], [G, K, D] (a basis for each group) or [D] (one direction); K <= D, any floating dtype.

    Returns:
        [K, D] or [G, K, D], fp32 (float64 where ``directions`` is), contiguous.

    Raises:
        ValueError: a shape or dtype that does not fit, a value that is not finite, or a direction that is zero or, to
            the precision of its dtype, a combination of those before it.
    """
    if not directions.is_floating_point():
        raise ValueError(f"directions: expected a floating dtype, got {directions.dtype}")
    rows = directions[None] if directions.dim() == 1 else directions
    if rows.dim() not in (2, 3) or not 1 <= rows.shape[-2] <= rows.shape[-1]:
        raise ValueError(
            f"directions: expected [K, D] or [G, K, D] with 1 <= K <= D, or [D], got shape {tuple(directions.shape)}"
        )
    exact = rows.double()
    if not torch.isfinite(exact).all():
        raise ValueError("directions: expected finite values, got NaN or infinity")
    length = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
    if not length.all():
        raise ValueError(f"directions: expected no zero row, got one at {_first(length[..., 0] == 0)}")
    q, r = torch.linalg.qr((exact / length).mT)
    diagonal = torch.diagonal(r, dim1=-2, dim2=-1)
    dependent = diagonal.abs() < 4 * torch.finfo(directions.dtype).eps
    if dependent.any():
        raise ValueError(
            f"directions: expected linearly independent rows, got one at {_first(dependent)} that the rows before it "
            "span; leave it out"
        )
    basis = q.mT * diagonal.detach().sign()[..., None]
    return basis.to(torch.float64 if directions.dtype == torch.float64 else torch.float32).contiguous()


def _first(where: Tensor) -> list[int]:
    return [int(i) for i in where.nonzero()[0]]
