"""The gradients of a step that is made of several backwards: all of them are added, or none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fastguard.nested.guard import Restoring
from fastguard.nested.weights import Select, Weights


@contextlib.contextmanager
def added_gradients(model: nn.Module, select: Select = None) -> Iterator[Weights]:
    """Gradients that arise inside are added to the earlier ones on leaving.

    Inside, every parameter starts from None. Left by an exception, the earlier gradients alone are there, and buffers
    are as they were, bit for bit, so that a step which failed half way can be tried again. Parameters that require a
    gradient but are not selected have their earlier one in any case (an adversary's adapters, through which the
    defender's backward passes).

    Args:
        model: plain, PEFT, or wrapped by FSDP2 or DDP; made ready for a backward that synchronises.
        select: whose gradients are wanted; None for all parameters that require one.

    Yields the selected parameters.
    """
    every = Weights(model)
    selected = every.among(select)
    buffers = [b for b in model.buffers() if b.device.type != "meta"]
    kept = [b.detach().clone() for b in buffers]
    with Restoring() as guard:
        earlier = every.take_gradients()

        def restore(finished: bool) -> None:
            every.prepare()
            inside = selected.take_gradients() if finished else []
            every.take_gradients()
            new = dict(zip(map(id, selected.parameters), inside, strict=False))
            if not finished:
                with torch.no_grad():
                    for b, k in zip(buffers, kept, strict=True):
                        b.copy_(k)
            every.put_gradients([_sum(a, new.get(id(p))) for p, a in zip(every.parameters, earlier, strict=True)])
            every.give_back()

        guard.on_exit(restore)
        guard.release()
        yield selected


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return b.add_(a)
