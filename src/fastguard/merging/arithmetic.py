"""The merges that treat every weight by itself: mathematics on one tensor's versions, in portions that a cache holds.

A merge writes into ``out``, which may be one of the versions that it reads. Arithmetic is fp32, or float64 where a
version is, and rounds once: a chain of additions in bf16 would lose every change below half of a weight's spacing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fastguard.merging.drop import keep
from fastguard.merging.trim import Largest

PORTION = 2**17
"""Weights at a time."""
COLLINEAR = 0.9995
"""Cosine beyond which slerp is lerp, as in mergekit."""

Portion = Callable[[list[Tensor], int], Tensor]
"""(versions of some weights, wide; the first one's place in the tensor) -> merged, as a tensor of its own."""


def wide(versions: Sequence[Tensor]) -> torch.dtype:
    """What arithmetic on these is done in."""
    return torch.float64 if any(v.dtype == torch.float64 for v in versions) else torch.float32


def portions(versions: Sequence[Tensor], out: Tensor, merge: Portion) -> None:
    """Apply a merge portion by portion."""
    flat, target, dtype = [v.reshape(-1) for v in versions], out.view(-1), wide(versions)
    for at in range(0, target.numel(), PORTION):
        store(target[at : at + PORTION], merge([v[at : at + PORTION].to(dtype) for v in flat], at))


def store(out: Tensor, merged: Tensor) -> None:
    """Round ``merged`` to ``out``, once. Raises FloatingPointError where it is not finite, or not in out's dtype."""
    if merged.numel():
        low, high = (float(x) for x in merged.aminmax())
        if not max(-low, high) <= torch.finfo(out.dtype).max:
            raise FloatingPointError(f"expected weights that {out.dtype} holds, got {low:g} to {high:g}")
    out.copy_(merged)


def weighted(coefficients: Sequence[float]) -> Portion:
    """sum_i c_i W_i."""
    first, *rest = coefficients

    def merge(parts: list[Tensor], at: int) -> Tensor:
        total = parts[0] * first
        for part, c in zip(parts[1:], rest, strict=True):
            total.add_(part, alpha=c)
        return total

    return merge


def shares(weights: Sequence[float], normalize: bool, tensor: str) -> list[float]:
    """Weights that add up to one, if that is wanted. Raises ValueError for a tensor where they add up to nothing."""
    total = math.fsum(weights)
    if not normalize:
        return list(weights)
    if abs(total) < 1e-8:
        raise ValueError(f"weight: expected weights that do not add up to 0 with normalize, got {weights} for {tensor}")
    return [w / total for w in weights]


def slerp_shares(first: Tensor, second: Tensor, t: float) -> tuple[float, float]:
    """How much of either there is on the arc between them at ``t``; of tensors (nearly) along one line, on the line."""
    dtype = wide((first, second))
    a, b = first.reshape(-1), second.reshape(-1)
    dot = norm_a = norm_b = 0.0
    for at in range(0, a.numel(), PORTION):
        x, y = (v[at : at + PORTION].to(dtype) for v in (a, b))
        dot, norm_a, norm_b = dot + float(x @ y), norm_a + float(x @ x), norm_b + float(y @ y)
    size = math.sqrt(norm_a) * math.sqrt(norm_b)
    cosine = max(-1.0, min(1.0, dot / size)) if size else 1.0
    if not abs(cosine) <= COLLINEAR:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def added(coefficients: Sequence[float], masks: Sequence[Mask] | None = None) -> Portion:
    """W_0 + sum_i c_i m_i (W_i - W_0)."""

    def merge(parts: list[Tensor], at: int) -> Tensor:
        base, total = parts[0], parts[0].clone()
        for i, (part, c) in enumerate(zip(parts[1:], coefficients, strict=True)):
            delta = part - base
            total.add_(delta if masks is None else masks[i](delta, at), alpha=c)
        return total

    return merge


def elected(weights: Sequence[float], masks: Sequence[Mask], normalize: bool, scale: float) -> Portion:
    """W_0 + scale times the mean, or sum, of those weighted changes that have the sign of all together.

    A sum of exactly zero counts as positive; a change of zero has no sign; where none is left, nothing is added.
    """

    def merge(parts: list[Tensor], at: int) -> Tensor:
        base, *others = parts
        up, down = torch.zeros_like(base), torch.zeros_like(base)  # sums of the positive and of the negative ones
        shares_up, shares_down = torch.zeros_like(base), torch.zeros_like(base)  # of the weights that are in them
        for other, mask, weight in zip(others, masks, weights, strict=True):
            change = mask(other - base, at).mul(weight)
            positive = change.clamp(min=0)
            up.add_(positive)
            down.add_(change.sub_(positive))  # exact: one of the two is zero
            if normalize:
                shares_up.add_(positive.sign_(), alpha=weight)
                shares_down.add_(change.sign_(), alpha=-weight)
        # 1 where the positive ones win, else 0: selection by products, since branches that go either way cost ten times
        # as much. Both are exact.
        wins = torch.full_like(base, 0.5).copysign_(up + down).add_(0.5)
        loses = 1 - wins
        mixed = up.mul_(wins).addcmul_(down, loses)
        if normalize:
            divisor = shares_up.mul_(wins).addcmul_(shares_down, loses)
            mixed.div_(divisor.add_(divisor == 0))
        return mixed.mul_(scale).add_(base)

    return merge


# masks ----------------------------------------------------------------------------------------------------------------

Mask = Callable[[Tensor, int], Tensor]
"""(a portion of a change, the first one's place) -> what is left of it. Portions come in order."""


def dropped(density: float, rescale: bool, seed: int, tensor: str, model: int) -> Mask:
    """DARE: each weight's change is kept with probability ``density``, and divided by it."""
    if density >= 1:
        return lambda delta, at: delta
    factor = 1 / density if rescale and density else 1.0

    def mask(delta: Tensor, at: int) -> Tensor:
        kept = keep(delta.numel(), at, density, seed=seed, tensor=tensor, model=model)
        return (delta * factor).mul_(kept)

    return mask


def trimmed(base: Tensor, model: Tensor, density: float) -> Mask:
    """TIES: of a tensor's changes the largest, ``density`` of them and at least one; of equal ones the first."""
    if density >= 1:
        return lambda delta, at: delta
    count = max(1, int(density * base.numel())) if density > 0 else 0
    dtype = wide((base, model))
    a, b = base.reshape(-1), model.reshape(-1)

    def changes() -> Iterator[Tensor]:
        for at in range(0, a.numel(), PORTION):
            yield b[at : at + PORTION].to(dtype) - a[at : at + PORTION].to(dtype)

    largest = Largest(changes, dtype, count)
    return lambda delta, at: largest.of(delta)
