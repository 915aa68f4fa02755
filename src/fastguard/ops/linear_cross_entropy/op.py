"""``linear_cross_entropy``: the common case on top of ``lm_head_stats``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastguard.ops.lm_head_stats import lm_head_stats

REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    filter_tol: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of a linear head, softplus(rest_lse - target_logit), without N x V logits.

    Differs from ``torch.nn.functional.cross_entropy`` in one point: with no target left, ``mean`` gives 0
    with zero gradients instead of NaN, so that a rank whose rows are all masked contributes nothing.

    Args:
        hidden: [..., D]. weight: [V, D]. target: int64 [...], ``ignore_index`` or another negative id to skip.
        bias, scale, softcap, filter_tol: see ``lm_head_stats``.
        ignore_index: the target that carries no loss.
        reduction: ``mean`` over the targets that count, ``sum``, or ``none`` for one loss a target.

    Returns:
        A scalar, or [...] for ``none``, in fp32 (float64 for float64 inputs).

    Raises:
        ValueError: as ``lm_head_stats``, or an unknown reduction. IndexError: a target of V or more.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if target.shape != hidden.shape[:-1]:
        raise ValueError(f"target: expected shape {tuple(hidden.shape[:-1])}, got {tuple(target.shape)}")
    flat = target.reshape(-1)
    counts = (flat != ignore_index) & (flat >= 0)
    stats = lm_head_stats(
        hidden.reshape(-1, hidden.shape[-1]), weight, flat.masked_fill(~counts, -1),
        bias=bias, scale=scale, softcap=softcap, filter_tol=filter_tol,
    )  # fmt: skip
    loss = torch.where(counts, stats.cross_entropy(), 0.0)
    if reduction == "none":
        return loss.reshape(target.shape)
    return loss.sum() if reduction == "sum" else loss.sum() / counts.sum().clamp_min(1)
