"""The specification of ``multi_tensor``: a loop over the tensors, in float64, rounded once where a tensor is written.

Reductions are returned in float64. Arguments are those of the functions in ``op.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of the squares of all elements."""
    return dot(tensors, tensors)


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Sum over all elements of a * b."""
    total = torch.zeros((), dtype=torch.float64)
    for x, y in zip(a, b, strict=True):
        total = total.to(x.device) + (x.double() * y.double()).sum()
    return total


def accumulate_(accumulators: Sequence[Tensor], tensors: Sequence[Tensor], weight: float | Tensor) -> None:
    """accumulator += weight * tensor."""
    for a, t in zip(accumulators, tensors, strict=True):
        a.copy_(a.double() + weight * t.double())


def perturb_(
    tensors: Sequence[Tensor],
    directions: Sequence[Tensor],
    scale: float | Tensor,
    *,
    source: Sequence[Tensor] | None = None,
    through: torch.dtype | None = None,
) -> Tensor:
    """tensor <- source + scale * direction; [intended^2, realised^2, intended * realised], summed."""
    totals = torch.zeros(3, dtype=torch.float64)
    for t, d, base in zip(tensors, directions, source or tensors, strict=True):
        intended = scale * d.double()
        old = t.to(through or t.dtype).double()
        t.copy_(base.double() + intended)
        realised = t.to(through or t.dtype).double() - old
        products = (intended * intended, realised * realised, intended * realised)
        totals = totals.to(t.device) + torch.stack([p.sum() for p in products])
    return totals


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: int,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """Loshchilov and Hutter 2019, algorithm 2, as ``torch.optim.AdamW`` has it; ``step`` counts from 1."""
    for p, g, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        g64 = g.double()
        mean = beta1 * m.double() + (1 - beta1) * g64
        square = beta2 * v.double() + (1 - beta2) * g64 * g64
        denominator = (square / (1 - beta2**step)).sqrt() + eps
        p.copy_((1 - lr * weight_decay) * p.double() - lr / (1 - beta1**step) * mean / denominator)
        m.copy_(mean)
        v.copy_(square)


def copy_(destinations: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """destination <- source, bit for bit."""
    for d, s in zip(destinations, sources, strict=True):
        d.copy_(s)
