"""``multi_tensor`` in plain PyTorch: a few calls per piece of a tensor, so that no temporary is larger than a piece.

The functions of every backend take lists of contiguous tensors on one device, checked by ``op.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastguard.ops.multi_tensor.scalars import AdamW

PIECE = 2**22
"""Elements that are worked on at a time: temporaries of 16 MB in fp32."""


def wide_of(*tensors: Tensor) -> torch.dtype:
    """The dtype of the arithmetic: float64 if any tensor is float64, else fp32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _pieces(*lists: Sequence[Tensor]) -> Iterator[tuple[torch.dtype, tuple[Tensor, ...]]]:
    """The arithmetic's dtype and flat views of the same piece of the i-th tensors, for all i and pieces."""
    for tensors in zip(*lists, strict=True):
        wide = wide_of(*tensors)
        for views in zip(*(t.view(-1).split(PIECE) for t in tensors), strict=True):
            if views[0].numel():
                yield wide, views


def _total(parts: list[Tensor], like: Sequence[Tensor], *shape: int) -> Tensor:
    """The sum of partial results; zeros of the given shape if there are none."""
    if not parts:
        return torch.zeros(shape, dtype=wide_of(*like), device=like[0].device if like else None)
    wide = wide_of(*like)
    return torch.stack([p.to(wide) for p in parts]).sum(0)


def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    """0-dim, in the widest of the arithmetics' dtypes."""
    return _total([t.to(wide).square().sum() for wide, (t,) in _pieces(tensors)], tensors)


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """0-dim, in the widest of the arithmetics' dtypes."""
    return _total([(x.to(wide) * y).sum() for wide, (x, y) in _pieces(a, b)], [*a, *b])


def accumulate_(accumulators: Sequence[Tensor], tensors: Sequence[Tensor], weight: float | Tensor) -> None:
    """accumulator += weight * tensor, rounded once."""
    for wide, (a, t) in _pieces(accumulators, tensors):
        a.copy_((t.to(wide) * weight).add_(a))


def perturb_(
    tensors: Sequence[Tensor],
    directions: Sequence[Tensor],
    scale: float | Tensor,
    source: Sequence[Tensor] | None,
    through: torch.dtype | None,
) -> Tensor:
    """[3]: sums of intended^2, realised^2 and intended * realised."""
    sums = []
    for wide, (t, d, base) in _pieces(tensors, directions, tensors if source is None else source):
        intended = d.to(wide) * scale
        new = (intended + base).to(t.dtype)
        realised = new.to(through or t.dtype).to(wide) - t.to(through or t.dtype)
        t.copy_(new)
        sums.append(torch.stack([(x * y).sum() for x, y in _products(intended, realised)]))
    return _total(sums, [*tensors, *directions, *(source or ())], 3)


def _products(intended: Tensor, realised: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
    return (intended, intended), (realised, realised), (intended, realised)


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    scalars: AdamW,
) -> None:
    """One step; every tensor is rounded once, and the update uses the moments before they are rounded."""
    for wide, (p, g, m, v) in _pieces(params, grads, exp_avgs, exp_avg_sqs):
        gradient = g.to(wide)
        mean = m.to(wide).lerp(gradient, scalars.mean_weight)
        square = (v.to(wide) * scalars.square_keep).addcmul_(gradient, gradient, value=scalars.square_weight)
        denominator = square.sqrt().div_(scalars.root_correction).add_(scalars.eps)
        p.copy_((p.to(wide) * scalars.decay).addcdiv_(mean, denominator, value=-scalars.step_size))
        m.copy_(mean)
        v.copy_(square)


def copy_(destinations: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """destination <- source, on one device."""
    if destinations:
        torch._foreach_copy_(list(destinations), list(sources))
