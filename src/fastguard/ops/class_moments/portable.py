"""``class_moments_`` in plain PyTorch.

The moments of a batch are taken in float64 and joined with those so far (Chan, Golub and LeVeque 1983), which are kept
as a number and what its rounding left, 48 bits in two fp32. Nothing cancels: the second moment is a sum of squared
distances from the mean.

Shapes: B samples, T tokens, D features, C classes, P positions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def exact(number: Tensor, rest: Tensor | None) -> Tensor:
    """A number and what its rounding left, in float64."""
    return number.double() if rest is None else number.double() + rest.double()


def keep(value: Tensor, number: Tensor, rest: Tensor | None) -> None:
    """Write a float64 value as a number and what its rounding left."""
    number.copy_(value)
    if rest is not None:
        # An infinite or lost value has no remainder.
        rest.copy_(torch.where(torch.isfinite(number), value - number.double(), 0))


def update(
    count: Tensor,
    mean: Tensor,
    mean_rest: Tensor | None,
    second: Tensor | None,
    second_rest: Tensor | None,
    x: Tensor,
    label: Tensor,
    positions: Tensor,
) -> None:
    """Take the samples x [B, T, D] with labels [B] into count [C], mean and second [C, P, D].

    positions: [P] or [B, P], within the T tokens, from the end where negative. The rests are None in float64.
    """
    for c in range(count.shape[0]):
        chosen = (label == c).nonzero()  # [n, 1]
        n = chosen.shape[0]
        if n == 0:
            continue
        at = positions if positions.dim() == 1 else positions[chosen[:, 0]]
        taken = x[chosen, at].double()  # [n, P, D]
        before = count[c].double()
        ours = taken.mean(0)
        delta = ours - exact(mean[c], None if mean_rest is None else mean_rest[c])
        moved = exact(mean[c], None if mean_rest is None else mean_rest[c]) + delta * (n / (before + n))
        keep(moved, mean[c], None if mean_rest is None else mean_rest[c])
        if second is not None:
            rest = None if second_rest is None else second_rest[c]
            spread = (taken - ours).square().sum(0) + delta.square() * (before * n / (before + n))
            keep(exact(second[c], rest) + spread, second[c], rest)
        count[c] += n
