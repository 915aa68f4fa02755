"""The gradient of a parameter that many taps share.

Taps compute on a detached, gathered copy of a parameter (`full`); the gradient comes back through one `Anchor`
on the parameter as the optimizer owns it. For an FSDP2 shard the anchor reduces the ranks' gradients and keeps this
rank's part, which is what FSDP does for its own gradients, but in every grouping of the modules: FSDP reduces a group's
gradients when the group's own modules are through, and that may be before the taps are.

What FSDP was told is done here too: its divide factor, its dtype of reductions, parameters in host memory. Tensor
parallelism divides a parameter among ranks that see the same data, and so have the same gradient of the whole: each
keeps its part, and nothing is reduced among them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastguard.fsdp2 import await_reductions, owners
from fastguard.ops.precision import accumulation_dtype

BLOCK = 128 << 20
"""Bytes of a gradient that are sent at a time, so that no second copy of it exists meanwhile."""


class Sharding:
    """How a parameter is divided among ranks, and how their gradients of it become one.

    Args:
        model: that it is a parameter of. parameter: a DTensor, while its FSDP2 group is sharded; also what DTensor
            arithmetic has made of one (an adapter added to it).

    Raises:
        ValueError: FSDP2 would do to its gradient what cannot be done here.
    """

    def __init__(self, model: nn.Module, parameter: Tensor) -> None:
        self.shape, self.stride, self.dtype = parameter.shape, parameter.stride(), parameter.dtype
        self.mesh, self.placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
        self.group, owned = _owner(model, parameter)
        local = parameter.to_local()  # type: ignore[attr-defined]
        self.local, self.home = local.shape, local.device
        if self.group is None:  # tensor parallelism alone
            self.device, self.reduced_in, self.factor = self.home, self.dtype, 1.0
            self.parts = _parts(self.mesh, self.placements)
            return
        if self.group._all_reduce_hook is not None:
            raise ValueError(
                "model: expected FSDP2 without set_all_reduce_hook, which a gradient of taps would not pass"
            )
        info, policy = self.group.mesh_info, self.group.mp_policy
        spec = owned._unsharded_dtensor_spec
        self.device, self.dim = self.group.device, owned.fsdp_placement.dim
        self.parts = [] if spec is None else _parts(spec.mesh, spec.placements)
        self.reduced_in = policy.reduce_dtype or policy.param_dtype or self.dtype
        self.factor = float(self.group.gradient_divide_factor or info.mesh.size())
        self.shards = getattr(info, "shard_process_group", None)
        self.replicas = getattr(info, "replicate_process_group", None)

    def distributed(self, local: Tensor) -> Tensor:
        """This rank's part, as a DTensor like the parameter."""
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(  # type: ignore[no-any-return]
            local, self.mesh, self.placements, run_check=False, shape=self.shape, stride=self.stride
        )

    def reduced(self, grad: Tensor | None) -> Tensor:
        """This rank's part, a DTensor, of the ranks' gradients of the whole parameter; None is a gradient of zeros."""
        if grad is None:
            grad = torch.zeros((), dtype=self.dtype, device=self.device).expand(self.shape)
        for dim, size, at in self.parts:
            grad = _chunk(grad, dim, size, at)
        if self.group is None:
            return self.distributed(grad.to(self.dtype, copy=True, memory_format=torch.contiguous_format))
        found = torch.empty(self.local, dtype=self.dtype, device=self.device)
        into = found.movedim(self.dim, 0)
        for start, rows in self._blocks(grad.movedim(self.dim, 0)):
            into[start : start + len(rows)] = rows[: max(len(into) - start, 0)]
        await_reductions(self.group)  # FSDP adds to the same gradient
        return self.distributed(found.to(self.home))

    def _blocks(self, grad: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Reduced rows of this rank's shard by their first, of ``grad`` with the sharded dimension in front."""
        dist = torch.distributed
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # torch 2.13 renamed it
        count = self.shards.size() if self.shards is not None else 1
        shard = -(-len(grad) // count)
        row = count * grad[:1].numel() * self.reduced_in.itemsize
        step = max(1, BLOCK // max(row, 1))
        for start in range(0, shard, step):
            width = min(step, shard - start)
            block = torch.zeros((count, width, *grad.shape[1:]), dtype=self.reduced_in, device=self.device)
            for to, rows in enumerate(block):
                given = grad[to * shard + start : to * shard + start + width]
                torch.div(given, self.factor, out=rows[: len(given)])
            mine = block[0]
            if count > 1:
                mine = torch.empty_like(mine)
                scatter(mine, block.flatten(0, 1), group=self.shards)
            if self.replicas is not None:
                dist.all_reduce(mine, group=self.replicas)
            yield start, mine


def _owner(model: nn.Module, parameter: Tensor) -> tuple[Any, Any]:
    """FSDP2's group and its record of a parameter; of what was computed from one, those of another laid out alike."""
    owned = [(group, p) for group in owners(model) for p in group.fsdp_params]
    for group, p in owned:
        if p.sharded_param is parameter:
            return group, p
    for group, p in owned:
        other = p.sharded_param
        if (other.device_mesh, other.placements) == (parameter.device_mesh, parameter.placements):  # type: ignore[attr-defined]
            return group, p
    if owned:
        raise ValueError(
            f"model: a DTensor of shape {tuple(parameter.shape)} does not belong to any of its FSDP2 groups; expected "
            "all parameters to be sharded by fully_shard"
        )
    return None, None


def _parts(mesh: Any, placements: Any) -> list[tuple[int, int, int]]:
    """(dimension, parts, this rank's) of each division by tensor parallelism. Raises ValueError for other kinds."""
    for placement in placements:
        if not (placement.is_replicate() or placement.is_shard()):
            raise ValueError(f"model: its head or final norm is placed {placements}; expected Shard or Replicate")
    return [(p.dim, mesh.size(i), mesh.get_local_rank(i)) for i, p in enumerate(placements) if p.is_shard()]


def _chunk(tensor: Tensor, dim: int, size: int, at: int) -> Tensor:
    """As ``torch.chunk(tensor, size, dim)[at]``, empty where that has fewer."""
    length = -(-tensor.shape[dim] // size)
    return tensor.movedim(dim, 0)[at * length : (at + 1) * length].movedim(0, dim)


def full(parameter: Tensor, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
    """The whole parameter, detached: gathered from all ranks where it is a DTensor (a collective call).

    dtype, device: of the result; a shard is converted before it is sent. None: the parameter's.
    """
    whole = parameter.detach()
    if not hasattr(whole, "full_tensor"):
        return whole.to(device, dtype)
    from torch.distributed.tensor import DTensor

    gathered: Tensor = DTensor.from_local(
        whole.to_local().to(device, dtype), whole.device_mesh, whole.placements, run_check=False,  # type: ignore[operator, attr-defined]
        shape=whole.shape, stride=whole.stride(),
    ).full_tensor()  # fmt: skip
    return gathered


class Anchor(torch.autograd.Function):
    """From a parameter to a value computed on in its place, and from that value's gradient back to it."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, value: Tensor | None, sharding: Sharding | None) -> Tensor:
        """``value`` attached to ``parameter``; for None a gradient token (see ``lens_stats``) of 4 bytes."""
        ctx.set_materialize_grads(False)
        ctx.dtype, ctx.sharding = parameter.dtype, sharding
        if value is not None:
            return value.view_as(value)
        wide = accumulation_dtype(parameter.dtype)
        device = parameter.device if sharding is None else sharding.device
        return torch.zeros((), dtype=wide, device=device).expand(parameter.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        """The gradient in the parameter's dtype; reduced over ranks and divided as the parameter is."""
        if ctx.sharding is None:
            return None if grads[0] is None else grads[0].to(ctx.dtype), None, None
        return ctx.sharding.reduced(grads[0]), None, None  # also of None: another rank may have one


class Source:
    """A parameter of ``model`` as taps read it: noted while it is sharded, gathered when it is wanted."""

    def __init__(self, model: nn.Module, parameter: Tensor) -> None:
        self.parameter = parameter
        self.sharding = Sharding(model, parameter) if hasattr(parameter, "full_tensor") else None

    def full(self, dtype: torch.dtype | None = None) -> Tensor:
        """See `full`; on the device that computes."""
        return full(self.parameter, dtype, None if self.sharding is None else self.sharding.device)

    def token(self) -> Tensor | None:
        """The first gradient token; None where no gradient is wanted."""
        return self._anchor(None) if self._wanted() else None

    def anchored(self) -> Tensor:
        """Ready to be computed on: the parameter itself, or gathered and anchored where it is sharded."""
        if self.sharding is None:
            return self.parameter
        return self._anchor(self.full()) if self._wanted() else self.full()

    def _wanted(self) -> bool:
        return self.parameter.requires_grad and torch.is_grad_enabled()

    def _anchor(self, value: Tensor | None) -> Tensor:
        found: Tensor = Anchor.apply(self.parameter, value, self.sharding)
        return found


def anchored(model: nn.Module, parameter: Tensor | None) -> Tensor | None:
    """See `Source.anchored`; None for None."""
    return None if parameter is None else Source(model, parameter).anchored()
