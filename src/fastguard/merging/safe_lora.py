"""SafeLoRA (arXiv 2405.16833): what alignment changed in a weight says where further changes may go.

With V = W_aligned - W_base, C = V V^T / ||V||_F is what paper and code call a projection. **It is none** (C C is not
C): along V's left singular direction i it multiplies by sigma_i^2 / ||V||_F, which shrinks or grows a change as V
happens to be scaled. It is the default here since it is what was published and measured; ``projector`` takes the
orthogonal projector onto V's range, or onto its strongest ``rank`` directions, in its place.

A module's change D (of an adapter B A; of a full checkpoint W - W_aligned plays its part) is replaced by C D where the
cosine between the two is at most ``tau``, or is among the lowest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fastguard.low_rank import top_svd
from fastguard.merging.options import SafeLora

Project = Callable[[Tensor], Tensor]
"""C times a matrix [d_out, n]; no matrix [d_out, d_out] is made where n is small."""


def projection(v: Tensor, options: SafeLora, called: str) -> Project | None:
    """C of one module; None where alignment changed nothing in it, and no direction is told from another.

    Args:
        v: [d_out, d_in], float32 or float64.
        called: the module, for errors.

    Raises:
        ValueError: the projector is asked for without ``rank``, and V has all directions: it would change nothing.
    """
    size = float(v.norm())
    if not size:
        return None
    if not options.projector:

        def scaled(change: Tensor) -> Tensor:
            rows, columns = v.shape
            # either order gives the same; the smaller square is the cheaper one
            if change.shape[1] < rows or columns < rows:
                return v @ (v.T @ change) / size
            return (v @ v.T) @ change / size

        return scaled
    basis = _basis(v, options.rank)
    if options.rank is None and basis.shape[1] == len(v):
        raise ValueError(
            f"rank: expected one with projector, since alignment changed {called} in all its {len(v)} directions; the "
            "projector onto all of them changes nothing"
        )
    return lambda change: basis @ (basis.T @ change)


def _basis(v: Tensor, rank: int | None) -> Tensor:
    """Orthonormal columns [d_out, k]: V's strongest left singular directions, or all that it has to rounding."""
    least = min(v.shape)
    u, s, _ = top_svd(v, least if rank is None else min(rank, least))
    return u[:, : int((s > s[0] * max(v.shape) * torch.finfo(v.dtype).eps).sum())]


def cosine(a: Tensor, b: Tensor) -> float:
    """Between two matrices as vectors; 0 where one of them is nothing."""
    size = float(a.norm()) * float(b.norm())
    return float(a.flatten() @ b.flatten()) / size if size else 0.0


def factor_cosine(projected: Tensor, b: Tensor, a: Tensor) -> float:
    """The cosine between ``projected @ a`` and ``b @ a`` from matrices [r, r]; neither product is made.

    Args:
        projected: C B [d_out, r]. b: B [d_out, r]. a: A [r, d_in].
    """
    gram = a @ a.T
    dot, one, two = (float((gram * (x.T @ y)).sum()) for x, y in ((projected, b), (projected, projected), (b, b)))
    size = (max(one, 0.0) * max(two, 0.0)) ** 0.5
    return dot / size if size else 0.0


def chosen(cosines: Mapping[str, float], options: SafeLora) -> list[str]:
    """The modules to be projected: all at most ``tau``; or the lowest, and those equal to the last of them."""
    tau = options.tau
    if options.count is not None:
        ordered = sorted(cosines.values())
        tau = ordered[min(options.count, len(ordered)) - 1] if ordered else 0.0
    return [name for name, c in cosines.items() if tau is not None and c <= tau]
