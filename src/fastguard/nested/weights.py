"""The trainable parameters of a model as plain local tensors, which is what a simulated attack reads and writes.

Under FSDP2 a parameter is a DTensor and its local tensor is this rank's shard; ``fastguard.fsdp2`` knows its traps.
Under DDP a gradient may be a view of a bucket that the next backward overwrites: it is copied when it is taken.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastguard import fsdp2
from fastguard.nested.guard import Restoring
from fastguard.nested.profile import span
from fastguard.ops.multi_tensor import dot, squared_norm
from fastguard.over_ranks import several, summed
from fastguard.ranks import DataRanks, data_ranks, refuse_other_parallelism

Select = Callable[[str, nn.Parameter], bool] | Iterable[nn.Parameter] | None

LISTS = "parameter lists"
"""The part of a profile that all this is."""


class Weights:
    """Parameters of ``model``, in a fixed order.

    Args:
        model: plain, PEFT, or wrapped by FSDP2 or DDP.
        select: a predicate on (name, parameter), the parameters themselves, or None for all that require a gradient.
        argument: what ``select`` is called in messages.
        beside: parameters by name that are trained with the model and are none of its own: whole on every rank, and
            averaged by `average` alone.

    Attributes:
        names, parameters: what was selected; a tied parameter counts once.

    Raises:
        ValueError: nothing was selected, or a parameter is on the meta device or has a Partial placement.
            The model is wrapped by FSDP1 or DeepSpeed ZeRO, whose parameters are not what they seem; or some of its
            trainable parameters are sharded and others not, whose gradients nobody averages; or ranks of its mesh
            divide something else than data and matrices.
        RuntimeError: gradients wait in FSDP2's private accumulators.
    """

    def __init__(
        self, model: nn.Module, select: Select = None, argument: str = "select",
        beside: Mapping[str, nn.Parameter] | None = None,
    ) -> None:  # fmt: skip
        with span(LISTS):
            self.model, self._beside = model, beside or {}
            self._ranks: DataRanks | None = None
            _refuse_other_sharding(model)
            modules = list(model.modules())
            self._groups = fsdp2.groups_of(modules)
            self._gathered: list[Callable[[], None]] = []  # shared with what is chosen among them
            self._replicas: list[Any] = [m for m in modules if hasattr(m, "require_backward_grad_sync")]
            self.refuse_waiting_gradients()
            self._flags = fsdp2.flags(self._groups)
            self._replica_flags = [replica.require_backward_grad_sync for replica in self._replicas]
            self.prepare()
            self._choose(select, argument)
            fsdp2.refuse_unsharded_among_shards(model)

    def _choose(self, select: Select, argument: str) -> None:
        model = self.model
        every = [*model.named_parameters(), *self._beside.items()]
        if select is None:
            chosen = [(n, p) for n, p in every if p.requires_grad]
        elif callable(select):
            chosen = [(n, p) for n, p in every if select(n, p)]
        else:
            wanted = {id(p) for p in select}
            chosen = [(n, p) for n, p in every if id(p) in wanted]
            if len(chosen) != len(wanted):
                missing = len(wanted) - len(chosen)
                raise ValueError(f"{argument}: {missing} of {len(wanted)} parameters are not the model's")
        if not chosen:
            total = sum(1 for _ in model.parameters())
            if select is None or not any(p.requires_grad for p in model.parameters()):
                raise ValueError(
                    f"model: none of its {total} parameters requires a gradient; expected at least one (is it frozen, "
                    "or a PEFT model in inference mode?)"
                )
            raise ValueError(f"{argument}: it selects none of the model's {total} parameters; expected at least one")
        for name, p in chosen:
            if p.device.type == "meta":
                raise ValueError(f"model: {name} is on the meta device; load it before it is attacked")
        self.names = [name for name, _ in chosen]
        self.parameters = [p for _, p in chosen]
        self._sharding = [_sharding(p, name) for name, p in chosen]

    def among(self, select: Select, argument: str = "select") -> Weights:
        """Another choice from the same model, whose modules are not walked again; raises as the constructor."""
        with span(LISTS):
            self.refuse_waiting_gradients()
            self.prepare()
            chosen = copy.copy(self)
            chosen._choose(select, argument)
            return chosen

    def subset(self, at: Sequence[int]) -> Weights:
        """The parameters of these indices, in this order."""
        chosen = copy.copy(self)
        chosen.names = [self.names[i] for i in at]
        chosen.parameters = [self.parameters[i] for i in at]
        chosen._sharding = [self._sharding[i] for i in at]
        return chosen

    @contextlib.contextmanager
    def only(self, chosen: Weights) -> Iterator[None]:
        """Passes inside make gradients of ``chosen`` alone, and none of the other parameters that are listed here.

        Their products are not computed, their activations not kept, and FSDP2 reduces nothing for them. A replica of
        DDP, which waits for all gradients, leaves those of ``chosen`` unreduced: see `average`.
        """
        kept = {id(p) for p in chosen.parameters}
        resting = [p for p in self.parameters if id(p) not in kept]

        def restore(finished: bool) -> None:
            for p in resting:
                p.requires_grad_(True)
            self.prepare()

        if resting:
            fsdp2.settle(self._groups)
        with Restoring() as guard:
            guard.on_exit(restore)
            for p in resting:
                p.requires_grad_(False)
            for replica in self._replicas if resting else ():
                replica.require_backward_grad_sync = False
            guard.release()
            yield

    @contextlib.contextmanager
    def reducing_in(self, dtype: torch.dtype | None) -> Iterator[None]:
        """FSDP2 reduces the gradients of backwards inside in ``dtype``; None, and a model that is not sharded: as ever.

        Raises ValueError under DDP, which reduces in the gradients' own dtype.
        """
        if dtype is None or not (self._replicas or self._groups):
            yield
            return
        if self._replicas:
            raise ValueError("reduce_dtype: expected a model that FSDP2 shards, got one of DDP")
        with Restoring() as guard:
            give_back = fsdp2.reduce_in(self._groups, dtype)
            guard.on_exit(lambda finished: give_back())
            guard.release()
            yield

    def gather(self) -> None:
        """Let FSDP2 keep what it gathers, from pass to pass, until `scatter`: for passes that leave the weights alone.

        Raises ValueError where what was chosen is sharded, which whoever chose it is going to write to.
        """
        if self.sharded:
            raise ValueError(f"gathered: expected an attacker who trains no shards, got {self.names[0]} among others")
        if self._groups and not self._gathered:
            self._gathered.append(fsdp2.keep_gathered(self._groups))

    def scatter(self) -> None:
        """The end of `gather`, if it was called."""
        while self._gathered:
            self._gathered.pop()()

    def average(self, gradients: Sequence[Tensor | None], resting: bool = False) -> None:
        """Make those that nobody else averages the mean over the data ranks, in place and in one piece a dtype.

        resting: whether the passes were made with some parameters at rest, so that DDP has averaged none.
        """
        every = resting and bool(self._replicas)
        beside = {id(p) for p in self._beside.values()}
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for p, g in zip(self.parameters, gradients, strict=True):
            if g is not None and (every or id(p) in beside):
                by_dtype.setdefault(g.dtype, []).append(g)
        if not by_dtype:
            return
        if self._ranks is None:
            self._ranks = data_ranks(self.model)
        for same in by_dtype.values() if several(self._ranks) else ():
            flat = summed(torch.cat([g.flatten() for g in same]), self._ranks) / self._ranks.divisor
            parts = flat.split([g.numel() for g in same])
            torch._foreach_copy_(same, [part.view(g.shape) for part, g in zip(parts, same, strict=True)])

    def __len__(self) -> int:
        return len(self.parameters)

    def prepare(self) -> None:
        """Shard every FSDP2 group again and make the next backward reduce its gradients.

        Raises nothing, as restorations rely on it. No gradient waited at construction: what waits now is left over from
        a backward that was cut short, and is dropped.
        """
        with span(LISTS):
            fsdp2.prepare(self._groups)
            for replica in self._replicas:
                replica.require_backward_grad_sync = True

    def give_back(self) -> None:
        """Let the next backward reduce its gradients, or not, as it would have done before the constructor."""
        self._flags()
        for replica, value in zip(self._replicas, self._replica_flags, strict=True):
            replica.require_backward_grad_sync = value

    def refuse_waiting_gradients(self) -> None:
        """Raise a RuntimeError if FSDP2 holds gradients that it has not reduced."""
        with span(LISTS):
            fsdp2.refuse_waiting_gradients(self._groups)

    @property
    def replicated(self) -> bool:
        """Whether DDP averages the gradients."""
        return bool(self._replicas)

    @property
    def sharded(self) -> bool:
        """Whether any parameter is a shard."""
        return any(s is not None for s in self._sharding)

    def local(self) -> list[Tensor]:
        """The parameters' local tensors, detached; writing to them writes to the parameters."""
        with span(LISTS):
            return [_local(p.detach()) for p in self.parameters]

    def take_gradients(self) -> list[Tensor | None]:
        """The local gradients, taken off the parameters; None where there is none."""
        with span(LISTS):
            for name, p in zip(self.names, self.parameters, strict=True):
                if p.grad is not None and p.grad.is_sparse:
                    raise ValueError(f"{name}: its gradient is sparse; expected a dense one")
            views = any(getattr(replica, "gradient_as_bucket_view", False) for replica in self._replicas)
            taken: list[Tensor | None] = []
            for p in self.parameters:
                grad, p.grad = p.grad, None
                taken.append(None if grad is None else _local(grad.clone() if views else grad))
            return taken

    def put_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        """Make local ``gradients`` the parameters' own, in the parameters' dtype."""
        with span(LISTS):
            for p, sharding, grad in zip(self.parameters, self._sharding, gradients, strict=True):
                if grad is None:
                    p.grad = None
                    continue
                value: Tensor = grad.to(p.dtype)
                if sharding is not None:
                    from torch.distributed.tensor import DTensor

                    mesh, placements = sharding
                    value = DTensor.from_local(
                        value, mesh, placements, run_check=False, shape=p.shape, stride=p.stride()
                    )
                p.grad = value

    def shard(self, whole: Tensor, index: int) -> Tensor:
        """This rank's part of ``whole``, of the shape of parameter ``index``, on the device of ``whole``."""
        sharding = self._sharding[index]
        if sharding is None:
            return whole
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = sharding  # every rank has the whole: nothing is sent
        return _local(distribute_tensor(whole, mesh, placements, src_data_rank=None)).to(whole.device, copy=True)

    def norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """The 2-norm over all tensors, one a parameter, and over all ranks' shards of them; 0-dim, no host sync."""
        with span("norms", tensors, 1):
            return self._sum(lambda at: squared_norm([tensors[i] for i in at])).sqrt()

    def dot(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        """The inner product over all tensors and all ranks' shards; 0-dim."""
        with span("norms", a, 2):
            return self._sum(lambda at: dot([a[i] for i in at], [b[i] for i in at]))

    def cosine(self, a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> Tensor:
        """Of the angle between two gradients, one a parameter and None where there is none in either; 0-dim."""
        held = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x is not None and y is not None]
        some = self.subset(held)
        one, other = ([t for i in held if (t := of[i]) is not None] for of in (a, b))
        return some.dot(one, other) / (some.norm(one) * some.norm(other))

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
            if not placement.is_replicate():  # FSDP2's shards of a tensor-parallel one are no Shard to torch
                torch.distributed.all_reduce(value, group=mesh.get_group(dim))
        return value


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


def _refuse_other_sharding(model: nn.Module) -> None:
    """Raise a ValueError where parameters hold something other than they seem to."""
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        raise ValueError("model: it is wrapped by FSDP1; expected FSDP2 (torch.distributed.fsdp.fully_shard)")
    refuse_other_parallelism(model)
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        raise ValueError("model: its parameters belong to DeepSpeed ZeRO-3; expected FSDP2, DDP or a plain model")
