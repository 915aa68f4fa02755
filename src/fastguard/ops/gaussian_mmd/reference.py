"""The specification of ``gaussian_mmd``: plain PyTorch, all pairwise differences at once.

Shapes: L layers, B samples, F features per sample, T mask entries per sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

KERNELS = 5
"""Bandwidths bw, 2 bw, ... 16 bw."""


def gaussian_mmd(x: Tensor, noise: Tensor, mask: Tensor | None = None) -> Tensor:
    """Biased MMD^2 [L] between the samples x [L, B, F] and noise [L, B, F], both multiplied by mask [B, T].

    The kernel is the sum of five Gaussians whose bandwidths are multiples of the mean squared distance among the
    2B rows (detached); where all rows coincide every kernel is 1, and the result and its gradient are 0.
    """
    if mask is not None:
        wide = mask.to(x.dtype).repeat_interleave(x.shape[-1] // mask.shape[-1], dim=-1)
        x, noise = x * wide, noise * wide
    rows = torch.cat([x, noise], dim=1)
    n, b = rows.shape[1], x.shape[1]
    d2 = (rows[:, :, None] - rows[:, None]).square().sum(-1)
    bandwidth = d2.detach().sum((1, 2), keepdim=True) / (n * n - n) / 4
    bandwidth = torch.where(bandwidth > 0, bandwidth, torch.ones_like(bandwidth))
    k = sum(torch.exp(-d2 / (bandwidth * 2**i)) for i in range(KERNELS))
    sign = torch.ones(n, dtype=x.dtype, device=x.device)
    sign[b:] = -1
    return torch.einsum("lij,i,j->l", k, sign, sign) / b**2
