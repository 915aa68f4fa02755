"""What a run holds, multiplies and sends, counted while it runs.

`Watch` sees every operator: bytes of live tensors (by storage: views count once, FSDP2's freed and refilled buffers as
they are), flops of products by torch's own formulas, bytes of collectives. Inside fastguard's ops a dispatch mode is
off; `Watch` enters itself again where an op calls its backend, so that tiles and their products are counted too. What
C++ allocates inside one call is not seen.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fastguard import backend
from fastguard.ops.lm_head_stats import packed

IN_PLACE = {torch.ops.aten.addmm_: torch.ops.aten.addmm}
"""Products that torch's flop counter has no formula for, and what they are otherwise."""


class Watch(TorchDispatchMode):
    """Counts what happens while it is on.

    Args:
        held: tensors that are not counted, whatever happens to them: the model's parameters, say.
        resized: whether storages shrink and grow where no operator sees it, as FSDP2's do; all are asked then, each
            time.

    Attributes:
        peak: bytes of live tensors at the worst moment, which was after the operator ``at``. flops: of products.
        gathered, scattered: bytes of all-gathers' outputs and of reduce-scatters' inputs.
    """

    def __init__(self, held: Iterable[Tensor] = (), resized: bool = False) -> None:
        super().__init__()
        self._storages: dict[int, Any] = {}
        self._sizes: dict[int, int] = {}
        self._live, self._resized = 0, resized
        self._held = {_key(t) for t in _plain(held)}
        self.peak = self.flops = self.gathered = self.scattered = 0
        self.at = ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._overloadpacket is torch.ops.aten.matmul:  # below autograd, where ops run, it arrives whole
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        for tensor in _plain(tree_leaves((args, kwargs, out))):
            self._note(tensor)
        packet = IN_PLACE.get(func._overloadpacket, func._overloadpacket)
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **{k: v for k, v in kwargs.items() if k != "out"}, out_val=out)
        if "c10d" in func.namespace:  # FSDP2's own collectives, and DTensor's functional ones
            self._count(func.name(), (args, out))
        live = self.live()
        if live > self.peak:
            self.peak, self.at = live, func.name()
        return out

    def live(self) -> int:
        """Bytes now."""
        if self._resized:
            return sum(s.nbytes() for ref in list(self._storages.values()) if (s := ref()) is not None)
        return self._live

    def reset(self) -> None:
        """Count anew what happens; what is held stays known."""
        self.peak = self.flops = self.gathered = self.scattered = 0

    @contextlib.contextmanager
    def on(self) -> Iterator[Watch]:
        """Count in here, inside fastguard's ops too.

        No head is packed, as on the GPUs that plans are for: the copy and its products are opaque to torch.
        """
        choose, largest = backend.choose, packed.LARGEST
        backend.choose = lambda op, device: _Entered(choose(op, device), self)
        packed.LARGEST = 0
        try:
            with self:
                yield self
        finally:
            backend.choose, packed.LARGEST = choose, largest

    def _note(self, tensor: Tensor) -> None:
        key = _key(tensor)
        if key in self._held:
            return
        if key not in self._storages:
            self._storages[key] = weakref.ref(tensor.untyped_storage(), lambda _: self._forget(key))
        size = tensor.untyped_storage().nbytes()
        self._live += size - self._sizes.get(key, 0)
        self._sizes[key] = size

    def _forget(self, key: int) -> None:
        self._storages.pop(key, None)
        self._live -= self._sizes.pop(key, 0)

    def _count(self, name: str, tensors: Any) -> None:
        largest = max((t.numel() * t.element_size() for t in tree_leaves(tensors) if isinstance(t, Tensor)), default=0)
        if "allgather" in name or "all_gather" in name:
            self.gathered += largest
        elif "reduce_scatter" in name:
            self.scattered += largest


class _Entered:
    """A backend of an op whose functions run under a mode."""

    def __init__(self, module: Any, mode: TorchDispatchMode) -> None:
        self._module, self._mode = module, mode

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if not callable(value):
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            with self._mode:
                return value(*args, **kwargs)

        return call


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _plain(leaves: Iterable[Any]) -> list[Tensor]:
    """Tensors with memory of their own, which forward mode's zeros have not; a DTensor's local part."""
    tensors = [getattr(leaf, "_local_tensor", leaf) for leaf in leaves if isinstance(leaf, Tensor)]
    return [t for t in tensors if type(t) in (Tensor, torch.nn.Parameter) and not t._is_zerotensor()]


def held_by(model: torch.nn.Module) -> list[Tensor]:
    """Parameters, their gradients and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return tensors + [p.grad for p in model.parameters() if p.grad is not None]
