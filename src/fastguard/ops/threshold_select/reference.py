"""The specification of ``threshold_select``: a stable sort of everything, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def numbers(scores: Tensor, weights: Tensor | None) -> Tensor:
    """What is compared: the scores, or |weights| * scores rounded to fp32 (float64 if either is); then in float64."""
    if weights is None:
        return scores.double()
    wide = torch.float64 if torch.float64 in (scores.dtype, weights.dtype) else torch.float32
    return (weights.to(wide).abs() * scores.to(wide)).double()


def largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """([n] bool, 0-dim): the k largest of x [n], of equal ones the first, and the smallest of them (inf if k is 0)."""
    order = x.sort(descending=True, stable=True).indices[:k]
    mask = torch.zeros(x.shape, dtype=torch.bool)
    mask[order] = True
    return mask, x[order].min() if len(order) else torch.tensor(float("inf"), dtype=torch.float64)


def select(
    scores: Sequence[Tensor], weights: Sequence[Tensor] | None, k: Sequence[int], per: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Boolean masks in the shapes of the scores, and thresholds: one, one a tensor or [rows] a tensor.

    k: entries of everything ([1]), of each tensor, or of each row of each tensor.
    """
    x = [numbers(s, None if weights is None else weights[i]) for i, s in enumerate(scores)]
    if per == "model":
        mask, threshold = largest(torch.cat([t.flatten() for t in x]), k[0])
        pieces = mask.split([t.numel() for t in x])
        return [m.view(t.shape) for m, t in zip(pieces, x, strict=True)], [threshold]
    if per == "tensor":
        found = [largest(t.flatten(), n) for t, n in zip(x, k, strict=True)]
        return [m.view(t.shape) for (m, _), t in zip(found, x, strict=True)], [threshold for _, threshold in found]
    masks, thresholds = [], []
    for t, n in zip(x, k, strict=True):
        rows = [largest(row, n) for row in (t.flatten(0, -2) if t.dim() > 1 else t.view(1, -1))]
        masks.append(torch.cat([m for m, _ in rows]).view(t.shape) if rows else torch.zeros(t.shape, dtype=torch.bool))
        thresholds.append(torch.stack([threshold for _, threshold in rows]) if rows else x[0].new_empty(0))
    return masks, thresholds
