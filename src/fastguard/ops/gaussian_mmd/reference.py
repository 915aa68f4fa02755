"""The specification of ``gaussian_mmd``: the published formula on explicit noise (RepNoise, arXiv 2405.14577).

Shapes: L layers, B samples, F = T * D features, T mask entries a sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

BANDWIDTHS = 5


def mmd(x: Tensor, z: Tensor) -> Tensor:
    """Biased MMD^2 between the rows of x and of z, both [B, F]: mean of K(x,x) + K(z,z) - K(x,z) - K(z,x).

    K sums exp(-d2 / (bw 2^i)) over i = 0..4, with bw a quarter of the mean squared distance between distinct rows
    of the pooled sample, detached. Where all rows coincide (bw = 0) every K is 5 and the MMD 0.
    """
    b = x.shape[0]
    pooled = torch.cat([x, z])
    d2 = (pooled[:, None] - pooled[None]).square().sum(-1)
    n = 2 * b
    bandwidth = d2.detach().sum() / (n * n - n) / 4
    if bandwidth == 0:
        return d2.sum() * 0
    kernel = sum(torch.exp(-d2 / (bandwidth * 2**i)) for i in range(BANDWIDTHS))
    return (kernel[:b, :b] + kernel[b:, b:] - kernel[:b, b:] - kernel[b:, :b]).mean()


def gaussian_mmd(x: Tensor, noise: Tensor, mask: Tensor | None = None) -> Tensor:
    """MMD^2 [L] between the samples x [L, B, F] and ``noise`` [L, B, F], both multiplied by mask [B, T]."""
    if mask is not None:
        wide = mask.to(x.dtype).repeat_interleave(x.shape[-1] // mask.shape[1], dim=1)
        x, noise = x * wide, noise * wide
    return torch.stack([mmd(a, z) for a, z in zip(x, noise, strict=True)])
