"""The specification of ``column_norms_``: what a batch adds to the sums, in plain PyTorch.

Shapes: B samples, T tokens, N rows of all samples, I features.
"""

from __future__ import annotations

import torch
from torch import Tensor


def squares(x: Tensor, bounds: Tensor) -> Tensor:
    """[B, I], each sample's own sums of squares: sum over its rows of x[row, i]^2.

    x: [B, T, I] or [N, I]. bounds: [B, 2], each sample's first row and the row behind its last.
    """
    rows = x.reshape(-1, x.shape[-1])
    samples = [rows[begin:end].square().sum(0) for begin, end in bounds.tolist()]
    return torch.stack(samples) if samples else rows.new_zeros(0, x.shape[-1])
