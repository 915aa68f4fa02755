"""The specification of ``linear_cross_entropy``: logits, then torch's cross-entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from fastguard.ops.lm_head_stats.reference import logits_of
from fastguard.ops.vocabulary import Head


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of hidden [..., D] under the head weight [V, D] against target [...].

    z_loss adds ``z_loss * lse^2`` of each row whose target is not ``ignore_index``; under ``mean`` their mean.
    """
    z = logits_of(hidden.reshape(-1, hidden.shape[-1]), Head(weight, bias, scale, softcap))
    z = z if z.dtype == torch.float64 else z.float()
    flat = target.reshape(-1)
    loss = torch.nn.functional.cross_entropy(
        z,
        flat,
        weight=None if class_weight is None else class_weight.to(z.dtype),
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    penalty = z_loss * z.logsumexp(1).square() * (flat != ignore_index)
    if reduction == "mean":
        return loss + penalty.sum() / (flat != ignore_index).sum()
    return loss + penalty.sum() if reduction == "sum" else (loss + penalty).reshape(target.shape)
