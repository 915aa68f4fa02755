"""The gradient of a parameter that many taps share.

Taps compute on a detached, gathered copy of a parameter (`full`); the gradient comes back through one `Anchor`
on the parameter as the optimizer owns it. For an FSDP2 shard the anchor averages the ranks' gradients and
keeps this rank's part, which is what FSDP does for its own gradients, but in every grouping of the modules:
FSDP reduces a group's gradients when the group's own modules are through, and that may be before the taps are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastguard.ops.precision import accumulation_dtype


def full(parameter: Tensor) -> Tensor:
    """The whole parameter, detached: gathered from all ranks where it is a DTensor (a collective call)."""
    whole = parameter.detach()
    return whole.full_tensor() if hasattr(whole, "full_tensor") else whole


class Anchor(torch.autograd.Function):
    """From a parameter to a value computed on in its place, and from that value's gradient back to it."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, value: Tensor | None) -> Tensor:
        """``value`` attached to ``parameter``; for None a gradient token (see ``lens_stats``) of 4 bytes."""
        ctx.set_materialize_grads(False)
        ctx.dtype, ctx.shape, ctx.device = parameter.dtype, parameter.shape, parameter.device
        ctx.mesh, ctx.placements = getattr(parameter, "device_mesh", None), getattr(parameter, "placements", None)
        if value is not None:
            return value.view_as(value)
        wide = accumulation_dtype(parameter.dtype)
        return torch.zeros((), dtype=wide, device=parameter.device).expand(parameter.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        """The gradient in the parameter's dtype; averaged over ranks and sharded like the parameter."""
        grad = None if grads[0] is None else grads[0].to(ctx.dtype)
        if ctx.mesh is None:
            return grad, None
        from torch.distributed.tensor import DTensor, Partial

        if grad is None:  # another rank may have one, and the reduction is a collective call
            grad = torch.zeros(ctx.shape, dtype=ctx.dtype, device=ctx.device)
        partial = DTensor.from_local(grad, ctx.mesh, [Partial("avg")] * ctx.mesh.ndim, run_check=False)
        sharded = partial.redistribute(placements=ctx.placements)
        if grad.is_cuda:  # FSDP adds its own reduction to the same gradient on a stream of its own
            torch.cuda.synchronize()
        return sharded, None


def anchored(parameter: Tensor | None) -> Tensor | None:
    """A parameter ready to be computed on: itself, or gathered and anchored where it is sharded."""
    if parameter is None or not hasattr(parameter, "full_tensor"):
        return parameter
    if not (parameter.requires_grad and torch.is_grad_enabled()):
        return full(parameter)
    value: Tensor = Anchor.apply(parameter, full(parameter))
    return value


def token(parameter: Tensor) -> Tensor | None:
    """The first gradient token of ``parameter``; None where no gradient is wanted."""
    if not (parameter.requires_grad and torch.is_grad_enabled()):
        return None
    value: Tensor = Anchor.apply(parameter, None)
    return value
