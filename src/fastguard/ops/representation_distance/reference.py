"""The specification of ``representation_distance``: plain PyTorch, all differences at once.

Shapes: L layers, N rows, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor


def representation_distance(a: Tensor, b: Tensor, mask: Tensor | None = None, kind: str = "l2") -> Tensor:
    """Distances [L, N] of the rows of a [L, N, D] from those of b; 0 where ``mask`` [N] is not set.

    ``l2``: |a - b|, whose gradient where a = b is 0. ``cosine``: 1 - cos(a, b), which is 1, with gradient 0, where
    either row is zero.
    """
    b = b.detach().to(a.dtype)
    if mask is not None:
        a, b = torch.where(mask[:, None], a, 0), torch.where(mask[:, None], b, 0)
    if kind == "l2":
        return torch.linalg.vector_norm(a - b, dim=-1)
    norm_a, norm_b = (torch.linalg.vector_norm(x, dim=-1) for x in (a, b))
    lives = (norm_a > 0) & (norm_b > 0)
    cosine = (a * b).sum(-1) / torch.where(lives, norm_a * norm_b, 1)
    distance = 1 - torch.where(lives, cosine, 0)
    return distance if mask is None else torch.where(mask, distance, 0)
