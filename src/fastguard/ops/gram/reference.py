"""The specification of ``gram_``: what a batch adds to the matrix, in plain PyTorch.

Shapes: B samples, T tokens, N rows of all samples, I features.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gram(x: Tensor, bounds: Tensor) -> Tensor:
    """[I, I], the sum over the samples' rows of x[row]^T x[row].

    x: [B, T, I] or [N, I]. bounds: [B, 2], each sample's first row and the row behind its last.
    """
    rows = x.reshape(-1, x.shape[-1])
    chosen = torch.cat([rows[:0], *(rows[begin:end] for begin, end in bounds.tolist())])
    return chosen.mT @ chosen
