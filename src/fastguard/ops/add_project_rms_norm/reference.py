"""The specification of ``add_project_rms_norm``: plain PyTorch.

Shapes: D features, K directions, G bases.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastguard.ops.project_out.reference import project_out


def add_project_rms_norm(
    residual: Tensor,
    update: Tensor,
    basis: Tensor | None,
    weight: Tensor | None,
    eps: float,
    scale: float = 1.0,
    kind: str = "rms",
    bias: Tensor | None = None,
    basis_index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(h, norm(h)) with h = residual + update [..., D], without scale times its part in the basis.

    ``rms``: weight h / sqrt(mean h^2 + eps) + bias; ``rms_offset``: 1 + weight in the place of weight; ``layer``: h
    less its mean in the place of h.
    """
    h = residual + update.to(residual.dtype)
    if basis is not None:
        h = project_out(h, basis, scale, basis_index)
    centred = h - h.mean(-1, keepdim=True) if kind == "layer" else h
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        normed = normed * (weight.to(h.dtype) + (1 if kind == "rms_offset" else 0))
    return h, normed if bias is None else normed + bias.to(h.dtype)
