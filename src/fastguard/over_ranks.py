"""Sums and means over the data ranks, so that a step does not depend on how many there are.

DDP and FSDP2 average the gradients of all ranks, and the mean of rank means is not the mean: ranks with few tokens
count for too much, and a function that is not linear in a mean (a logarithm, a norm) sees part of the batch. Here each
rank computes the loss of the undivided batch: what it sums over its own samples becomes the sum of all ranks, with a
gradient as many times as there are ranks, which the engine's average takes back (or as many times as FSDP2 was told to
divide by).

Functions take ``ranks``, what ``fastguard.ranks.data_ranks`` says of a model; None, or one rank, leaves every number to
the bit what it is without this module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastguard.machine import ranks as job_ranks
from fastguard.ranks import DataRanks

Result = TypeVar("Result")


class _Total(torch.autograd.Function):
    """The sum over ranks. What follows is the same on all of them, and so is its gradient: nothing is sent for that."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: DataRanks) -> Tensor:
        ctx.divisor = ranks.divisor
        return summed(x.clone(), ranks)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.divisor, None


class _Shared(torch.autograd.Function):
    """The sum over ranks, which each uses for something else: the gradients of all uses come back to all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: DataRanks) -> Tensor:
        ctx.ranks = ranks
        return summed(x.clone(), ranks)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return summed(grads[0].clone(memory_format=torch.contiguous_format), ctx.ranks), None


def several(ranks: DataRanks | None) -> bool:
    """Whether there is another rank to ask."""
    return ranks is not None and ranks.size > 1


def summed(x: Tensor, ranks: DataRanks | None) -> Tensor:
    """``x``, summed in place over all data ranks, without a gradient."""
    if several(ranks):
        torch.distributed.all_reduce(x, group=ranks.group)  # type: ignore[union-attr]
    return x


def totals(ranks: DataRanks | None, *sums: Tensor) -> tuple[Tensor, ...]:
    """The sums over all data ranks, of what each rank has; one all-reduce, no wait for the device.

    The first says the dtype of the others; the loss is made of all of them, in the same way on all ranks.
    """
    if not several(ranks):
        return sums
    flat = _Total.apply(torch.cat([x.flatten().to(sums[0]) for x in sums]), ranks)
    return tuple(part.view(x.shape) for part, x in zip(flat.split([x.numel() for x in sums]), sums, strict=True))


def mean_for_all(rows: Tensor, ranks: DataRanks | None) -> Tensor:
    """The mean of rows [N, D] and of those of the other ranks, for each rank to compare its own with."""
    if not several(ranks):
        return rows.mean(0)
    both: Tensor = _Shared.apply(torch.cat([rows.sum(0), rows.new_full((1,), len(rows))]), ranks)
    return both[:-1] / both[-1]


def mean(values: Tensor, ranks: DataRanks | None) -> Tensor:
    """The mean of ``values`` and of those that the other ranks have."""
    if not several(ranks):
        return values.mean()
    total, count = totals(ranks, values.sum(), torch.tensor(values.numel(), device=values.device))
    return total / count


def weighted(own: Tensor, count: Tensor | int, ranks: DataRanks | None) -> Tensor:
    """The mean over all ranks' entries from ``own``, means over the ``count`` (one a mean, or one for all) here."""
    if not several(ranks):
        return own
    counts = own.new_empty(own.shape).copy_(torch.as_tensor(count))
    total, number = totals(ranks, own * counts, counts)
    return total / number


def gathered(numbers: list[int], ranks: DataRanks) -> list[list[int]]:
    """What each data rank gives, in their order."""
    own = torch.tensor(numbers, device=_device(ranks.group))
    every = [torch.empty_like(own) for _ in range(ranks.size)]
    torch.distributed.all_gather(every, own, group=ranks.group)
    found: list[list[int]] = torch.stack(every).tolist()
    return found


def agreed(check: Callable[[], Result]) -> Result:
    """What ``check()`` returns; where it raises on some rank of the job, a ValueError on all that says where and why.

    Without it the ranks that have found nothing wrong would wait for the others in their next collective call. With one
    process the error is what it is. Costs one all-reduce of a number.
    """
    if job_ranks() == 1:
        return check()
    found: list[Result] = []
    error: Exception | None = None
    try:
        found.append(check())
    except Exception as raised:
        error = raised
    failed = torch.tensor(int(error is not None), device=_device(None))
    torch.distributed.all_reduce(failed, op=torch.distributed.ReduceOp.MAX)
    if not int(failed):
        return found[0]
    said: list[str | None] = [None] * job_ranks()
    torch.distributed.all_gather_object(said, None if error is None else f"{type(error).__name__}: {error}")
    raise ValueError("; ".join(f"rank {i}: {text}" for i, text in enumerate(said) if text)) from error


def _device(group: Any) -> torch.device:
    """Where numbers of the host are sent from: the CPU, unless the group's backend knows the GPU alone."""
    if torch.distributed.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
