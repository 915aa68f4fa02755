"""The specification of ``class_moments_``: what the moments of all samples together are, in plain PyTorch.

Shapes: B samples, T tokens, D features, C classes, P positions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def moments(x: Tensor, label: Tensor, classes: int, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(count [C], mean [C, P, D], sum of squared distances from the mean [C, P, D]) of x [B, T, D].

    label: [B], -1 for a sample that is left out. positions: [P] or [B, P], from the end where negative. Where a class
    has no sample, both are 0.
    """
    rows = torch.arange(x.shape[0], device=x.device)[:, None]
    taken = x[rows, positions.expand(x.shape[0], -1)]  # [B, P, D]
    member = (label[:, None] == torch.arange(classes, device=x.device)).to(x.dtype)  # [B, C]
    count = member.sum(0)
    size = count.clamp(min=1)[:, None, None]
    mean = torch.einsum("bc,bpd->cpd", member, taken) / size
    distance = (taken[:, None] - mean).square() * member[:, :, None, None]
    return count.long(), mean, distance.sum(0)
