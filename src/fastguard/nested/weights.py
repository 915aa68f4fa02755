"""The trainable parameters of a model as plain local tensors, which is what a simulated attack reads and writes.

Under FSDP2 a parameter is a DTensor and its local tensor is this rank's shard. Three traps are met here, once:

* after a forward without backward the root group stays gathered, and the next forward computes on that stale copy:
  every group is resharded before parameters are listed, read or written;
* gradients that were accumulated without synchronisation wait in a private place, survive ``zero_grad`` and leak
  into the next synchronised backward: they are refused;
* inside a trainer's ``no_sync`` a backward leaves ``p.grad`` at None: synchronisation is switched on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastguard.ops.multi_tensor import dot, squared_norm

Select = Callable[[str, nn.Parameter], bool] | Iterable[nn.Parameter] | None


class Weights:
    """Parameters of ``model``, in a fixed order.

    Args:
        model: plain, PEFT, or wrapped by FSDP2 or DDP.
        select: a predicate on (name, parameter), the parameters themselves, or None for all that require a gradient.

    Attributes:
        names, parameters: what was selected; a tied parameter counts once.

    Raises:
        ValueError: nothing was selected, or a parameter is on the meta device or has a Partial placement.
        RuntimeError: gradients wait in FSDP2's private accumulators.
    """

    def __init__(self, model: nn.Module, select: Select = None) -> None:
        self.model = model
        self._groups = [m for m in model.modules() if hasattr(m, "unshard") and hasattr(m, "reshard")]
        self.prepare()
        if select is None:
            chosen = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        elif callable(select):
            chosen = [(n, p) for n, p in model.named_parameters() if select(n, p)]
        else:
            wanted = {id(p) for p in select}
            chosen = [(n, p) for n, p in model.named_parameters() if id(p) in wanted]
            if len(chosen) != len(wanted):
                raise ValueError(f"select: {len(wanted) - len(chosen)} of {len(wanted)} parameters are not the model's")
        if not chosen:
            raise ValueError(
                "model: none of its parameters is selected; expected at least one that requires a gradient"
            )
        for name, p in chosen:
            if p.device.type == "meta":
                raise ValueError(f"model: {name} is on the meta device; load it before it is attacked")
        self.names = [name for name, _ in chosen]
        self.parameters = [p for _, p in chosen]
        self._sharding = [_sharding(p, name) for name, p in chosen]

    def __len__(self) -> int:
        return len(self.parameters)

    def prepare(self) -> None:
        """Shard every FSDP2 group again and make the next backward reduce its gradients."""
        for group in self._groups:
            _refuse_waiting_gradients(group)
            group.reshard()  # type: ignore[operator]
            group.set_requires_gradient_sync(True, recurse=False)  # type: ignore[operator]
        if hasattr(self.model, "require_backward_grad_sync"):
            self.model.require_backward_grad_sync = True  # type: ignore[assignment]

    @property
    def sharded(self) -> bool:
        """Whether any parameter is a shard."""
        return any(s is not None for s in self._sharding)

    def local(self) -> list[Tensor]:
        """The parameters' local tensors, detached; writing to them writes to the parameters."""
        return [_local(p.detach()) for p in self.parameters]

    def take_gradients(self) -> list[Tensor | None]:
        """The local gradients, taken off the parameters; None where there is none."""
        taken: list[Tensor | None] = []
        for name, p in zip(self.names, self.parameters, strict=True):
            grad, p.grad = p.grad, None
            if grad is not None and grad.is_sparse:
                raise ValueError(f"{name}: its gradient is sparse; expected a dense one")
            taken.append(None if grad is None else _local(grad))
        return taken

    def put_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        """Make local ``gradients`` the parameters' own, in the parameters' dtype."""
        for p, sharding, grad in zip(self.parameters, self._sharding, gradients, strict=True):
            if grad is None:
                p.grad = None
                continue
            value: Tensor = grad.to(p.dtype)
            if sharding is not None:
                from torch.distributed.tensor import DTensor

                mesh, placements = sharding
                value = DTensor.from_local(value, mesh, placements, run_check=False, shape=p.shape, stride=p.stride())
            p.grad = value

    def norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """The 2-norm over all tensors, one a parameter, and over all ranks' shards of them; 0-dim, no host sync."""
        return self._sum(lambda at: squared_norm([tensors[i] for i in at])).sqrt()

    def dot(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        """The inner product over all tensors and all ranks' shards; 0-dim."""
        return self._sum(lambda at: dot([a[i] for i in at], [b[i] for i in at]))

    def _sum(self, local: Callable[[list[int]], Tensor]) -> Tensor:
        """The sum of ``local(indices)`` over parameters of one sharding, reduced over its ranks, over all shardings."""
        parts = [self.reduce(local(at), at[0]) for at in self.by_sharding()]
        wide = max((part.dtype for part in parts), key=lambda dtype: dtype.itemsize)
        return torch.stack([part.to(wide) for part in parts]).sum(0)

    def by_sharding(self) -> list[list[int]]:
        """Indices of the parameters, those that are sharded alike together: what is reduced over the same ranks."""
        found: dict[Any, list[int]] = {}
        for i, sharding in enumerate(self._sharding):
            found.setdefault(sharding, []).append(i)
        return list(found.values())

    def reduce(self, value: Tensor, index: int = 0) -> Tensor:
        """``value`` summed over the ranks that hold other shards of parameter ``index``; itself if there are none."""
        sharding = self._sharding[index]
        if sharding is None:
            return value
        mesh, placements = sharding
        for dim, placement in enumerate(placements):
            if placement.is_shard():
                torch.distributed.all_reduce(value, group=mesh.get_group(dim))
        return value

    def everywhere(self, flag: Tensor) -> bool:
        """Whether ``flag`` (0-dim bool) holds on every rank of the job, so that all of them raise, or none does."""
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            return bool(flag)
        value = flag.to(torch.int32)
        distributed.all_reduce(value, op=distributed.ReduceOp.MIN)
        return bool(value)


def _local(tensor: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[operator]
        return found.wait() if hasattr(found, "wait") else found


def _sharding(p: Tensor, name: str) -> tuple[Any, tuple[Any, ...]] | None:
    """(mesh, placements) of a DTensor parameter, None of a plain one."""
    placements = getattr(p, "placements", None)
    if placements is None:
        return None
    if any(placement.is_partial() for placement in placements):
        raise ValueError(f"model: {name} has placements {placements}; expected Shard and Replicate alone")
    return p.device_mesh, tuple(placements)  # type: ignore[attr-defined]


def _refuse_waiting_gradients(group: Any) -> None:
    state = group._get_fsdp_state() if hasattr(group, "_get_fsdp_state") else None
    params = getattr(getattr(state, "_fsdp_param_group", None), "fsdp_params", ())
    if any(getattr(p, "unsharded_accumulated_grad", None) is not None for p in params):
        raise RuntimeError(
            "model: FSDP2 holds gradients that were accumulated without synchronisation (set_requires_gradient_sync("
            "False), no_sync); they would leak into the attack. Synchronise every micro-batch of a nested defense"
        )
