"""The specification of ``project_out``: plain PyTorch.

Shapes: D features, K directions, G bases.
"""

from __future__ import annotations

import torch
from torch import Tensor


def project_out(
    x: Tensor, basis: Tensor, scale: float = 1.0, basis_index: Tensor | None = None, preserve_norm: bool = False
) -> Tensor:
    """x - scale (x Q^T) Q for the rows of x [..., D]; basis: Q [K, D], or [G, K, D] with one of them for each row.

    basis_index: of the leading dimensions of x; -1 leaves a row as it is. preserve_norm: the result is brought back to
    the length of its row, 0 where nothing is left.
    """
    q = basis.to(x.dtype)
    if basis_index is None:
        out = x - scale * (x @ q.mT) @ q
    else:
        index = basis_index.reshape(*basis_index.shape, *(1,) * (x.dim() - 1 - basis_index.dim())).expand(x.shape[:-1])
        own = torch.where((index < 0)[..., None, None], 0, q[index.clamp(min=0)])  # [..., K, D]
        out = x - scale * (own.mT @ (own @ x[..., None]))[..., 0]
    if preserve_norm:
        left = torch.linalg.vector_norm(out, dim=-1, keepdim=True)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        kept = torch.where(left == 0, 0, out * length / torch.where(left == 0, 1, left))
        if basis_index is None:
            return kept
        return torch.where((index < 0)[..., None], x, kept)
    return out
