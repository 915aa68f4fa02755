"""The initial model, without a second one resident: its weights change places with the live ones for one forward.

Retain terms compare hidden states with those of the model as it was before the defense. Published code keeps a second
model on the GPU for that. Here the initial weights wait in host memory (each rank its own shards); `installed`
exchanges them, tensor by tensor, with the live ones, which wait there in their turn, and exchanges them back. Nothing
but one tensor is ever held twice. Cost: 2 bytes read and 2 written over the bus per byte of parameters, twice a use.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fastguard.nested.guard import Restoring
from fastguard.nested.profile import span
from fastguard.nested.weights import Select, Weights

EXCHANGE = "reference exchange"
"""The part of a profile; each tensor is cloned and copied over, and the clone copied back."""


class Reference:
    """The weights of ``model`` as they are now, to be consulted while the model moves on.

    Args:
        model: plain, PEFT, or wrapped by FSDP2 or DDP. A PEFT model whose adapters alone are trained needs no copy: its
            adapters are switched off instead. Taken before FSDP2 shards the model it is whole on every rank until its
            first use; a model too large for that is sharded first.
        select: the parameters that will move; None for all that require a gradient.

    Attributes:
        bytes: host memory that it takes on this rank; 0 with adapters.
    """

    def __init__(self, model: nn.Module, select: Select = None) -> None:
        self.model = model
        weights = Weights(model, select)
        weights.give_back()
        self._adapters = hasattr(model, "disable_adapter") and all(
            ".lora_" in name or ".modules_to_save." in name for name in weights.names
        )
        self._select: Select = (lambda name, p: p.requires_grad) if select is None else select
        self._host: list[Tensor] = []
        if not self._adapters:
            self._host = [_to_host(t) for t in weights.local()]
        self.bytes = sum(t.numel() * t.element_size() for t in self._host)

    @contextlib.contextmanager
    def installed(self, model: nn.Module | None = None) -> Iterator[nn.Module]:
        """The reference in the place of ``model`` (None: the constructor's), without gradients; undone on leaving."""
        model = self.model if model is None else model
        if self._adapters:
            with torch.no_grad(), self.model.disable_adapter():  # type: ignore[operator]
                yield model
            return
        weights = Weights(model, self._select)
        live = weights.local()
        self._fit(weights, live)
        exchanged: list[tuple[Tensor, Tensor]] = []

        def restore(finished: bool) -> None:
            weights.prepare()
            with span(EXCHANGE, self._host, 4):
                for mine, theirs in exchanged:
                    _exchange(mine, theirs)
            torch.clear_autocast_cache()
            weights.give_back()

        with torch.no_grad(), Restoring() as guard:
            guard.on_exit(restore)
            with span(EXCHANGE, self._host, 4):
                for mine, theirs in zip(live, self._host, strict=True):
                    guard.hold()  # a tensor is exchanged whole or not at all
                    _exchange(mine, theirs)
                    exchanged.append((mine, theirs))
                    guard.release()
            torch.clear_autocast_cache()  # it holds the live weights, cast, for all of an autocast's forwards
            yield model

    @contextlib.contextmanager
    def consulted(self, model: nn.Module | None = None) -> Iterator[nn.Module]:
        """`installed`, and without dropout: every module's own mode is put back."""
        model = self.model if model is None else model
        training = [module for module in model.modules() if module.training]
        try:
            for module in training:
                module.training = False
            with self.installed(model) as reference:
                yield reference
        finally:
            for module in training:
                module.training = True

    def _fit(self, weights: Weights, live: list[Tensor]) -> None:
        """Keep, of a reference that was taken before FSDP2, this rank's shards alone, in the dtype they have now.

        Contents are exchanged: in a narrower dtype the live weights would lose what they have gained.
        """
        shapes = [p.shape for p in weights.parameters]
        if weights.sharded and [t.shape for t in self._host] == shapes != [t.shape for t in live]:
            self._host = [weights.shard(t, i) for i, t in enumerate(self._host)]
        if [t.shape for t in live] != [t.shape for t in self._host]:
            raise ValueError("model: its trainable parameters are not those that the reference was taken of")
        self._host = [
            _to_host(host.to(t.dtype)) if host.dtype != t.dtype else host
            for host, t in zip(self._host, live, strict=True)
        ]
        self.bytes = sum(t.numel() * t.element_size() for t in self._host)


def _to_host(t: Tensor) -> Tensor:
    copy = torch.empty(t.shape, dtype=t.dtype, pin_memory=t.device.type == "cuda")
    return copy.copy_(t)


def _exchange(a: Tensor, b: Tensor) -> None:
    """Swap contents; ``b`` is in host memory.

    To autograd ``a`` has not changed, and will not have when the next backward comes: graphs of earlier forwards hold.
    """
    with torch.autograd._unsafe_preserve_version_counter(a):
        waiting = a.clone()
        a.copy_(b)
        b.copy_(waiting)
