"""``multi_tensor`` on CPU: csrc/cpu/multi_tensor.cpp, one threaded pass over all tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastguard import _extension
from fastguard.ops.multi_tensor.portable import wide_of
from fastguard.ops.multi_tensor.scalars import AdamW

_extension.load()


def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    """See ``portable.squared_norm``."""
    out = torch.empty((), dtype=torch.float64)
    torch.ops.fastguard_c.multi_tensor_squared_norm(tensors, out)
    return out.to(wide_of(*tensors))


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """See ``portable.dot``."""
    out = torch.empty((), dtype=torch.float64)
    torch.ops.fastguard_c.multi_tensor_dot(a, b, out)
    return out.to(wide_of(*a, *b))


def accumulate_(accumulators: Sequence[Tensor], tensors: Sequence[Tensor], weight: float | Tensor) -> None:
    """See ``portable.accumulate_``."""
    if tensors:
        torch.ops.fastguard_c.multi_tensor_accumulate(accumulators, tensors, weight)


def perturb_(
    tensors: Sequence[Tensor],
    directions: Sequence[Tensor],
    scale: float | Tensor,
    source: Sequence[Tensor] | None,
    through: torch.dtype | None,
) -> Tensor:
    """See ``portable.perturb_``."""
    out = torch.empty(3, dtype=torch.float64)
    torch.ops.fastguard_c.multi_tensor_perturb(tensors, directions, source or [], scale, through, out)
    return out.to(wide_of(*tensors, *directions, *(source or ())))


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    scalars: AdamW,
) -> None:
    """See ``portable.adamw_``."""
    if params:
        torch.ops.fastguard_c.multi_tensor_adamw(params, grads, exp_avgs, exp_avg_sqs, *scalars)


def copy_(destinations: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """See ``portable.copy_``."""
    if destinations:
        torch.ops.fastguard_c.multi_tensor_copy(destinations, sources)
