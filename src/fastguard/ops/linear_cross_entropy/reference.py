"""The specification of ``linear_cross_entropy``: logits, then torch's cross-entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from fastguard.ops.lm_head_stats.reference import logits_of


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of hidden [..., D] under the head weight [V, D] against target [...]."""
    z = logits_of(hidden.reshape(-1, hidden.shape[-1]), weight, bias, scale, softcap)
    z = z if z.dtype == torch.float64 else z.float()
    flat = target.reshape(-1)
    loss = torch.nn.functional.cross_entropy(z, flat, ignore_index=ignore_index, reduction=reduction)
    return loss.reshape(target.shape) if reduction == "none" else loss
