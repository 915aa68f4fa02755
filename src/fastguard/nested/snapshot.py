"""Where the original weights wait while an attack is simulated.

A snapshot holds one copy of the parameters, on their device or in (pinned) host memory, by a stated byte budget. It
needs none at all where the parameters are roundings of fp32 masters: they are then rounded again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastguard.nested.profile import span
from fastguard.ops.multi_tensor import copy_

Where = str | int | Sequence[Tensor]


class Snapshot:
    """One bit-exact copy of ``tensors``, taken by `take` and written back by `restore_`.

    Args:
        tensors: local tensors; they are written to by `restore_`.
        where: ``device``; ``host`` (pinned where the tensors are on a GPU; the buffers are kept for the next `take`);
            an integer, the bytes that may be held on the device, beyond which the host holds all; or fp32 masters, one
            a tensor, of which the tensors are the roundings: nothing is copied then.

    Attributes:
        bytes: what the copy occupies. location: ``device``, ``host`` or ``masters``.

    Raises:
        ValueError: ``where`` is none of these, or the tensors are not the masters' roundings.
    """

    def __init__(self, tensors: Sequence[Tensor], where: Where = "device") -> None:
        self.tensors = list(tensors)
        size = sum(t.numel() * t.element_size() for t in self.tensors)
        self._masters: list[Tensor] | None = None
        self._copy: list[Tensor] | None = None
        if isinstance(where, bool) or (isinstance(where, int) and where < 0):
            raise ValueError(f"snapshot: expected a budget of 0 bytes or more, got {where!r}")
        if isinstance(where, int):
            self.location = "device" if size <= where else "host"
        elif isinstance(where, str):
            if where not in ("device", "host"):
                raise ValueError(f"snapshot: expected device, host, a number of bytes or masters, got {where!r}")
            self.location = where
        else:
            self.location, self._masters = "masters", list(where)
            if [m.shape for m in self._masters] != [t.shape for t in self.tensors]:
                raise ValueError("snapshot: expected one master a parameter, each of its local shape")
        self.bytes = 0 if self._masters is not None else size

    @torch.no_grad()
    def take(self) -> None:
        """Copy the tensors, or make sure that the masters can stand in for a copy."""
        if self._masters is not None:
            with span("snapshot", [*self.tensors, *self._masters], 1):
                for i, (t, m) in enumerate(zip(self.tensors, self._masters, strict=True)):
                    if not _same_bits(t, m.to(t.device, t.dtype)):
                        raise ValueError(f"snapshot: parameter {i} is not its master rounded to {t.dtype}")
            return
        with span("snapshot", self.tensors, 2):
            if self._copy is None:
                self._copy = [self._like(t) for t in self.tensors]
            copy_(self._copy, self.tensors)
            _synchronize(self.tensors, self.location)

    def _like(self, t: Tensor) -> Tensor:
        if self.location == "host" and t.device.type == "cuda":
            return torch.empty(t.shape, dtype=t.dtype, pin_memory=True)
        return torch.empty(t.shape, dtype=t.dtype, device="cpu" if self.location == "host" else t.device)

    def original(self, i: int) -> Tensor:
        """The i-th as it was taken, on the device of the tensor; not to be written to."""
        if self._copy is None and self._masters is None:
            raise RuntimeError("snapshot: original before take")
        held = self._masters if self._copy is None else self._copy
        assert held is not None
        return held[i].to(self.tensors[i].device, self.tensors[i].dtype)

    def parked(self, t: Tensor) -> Tensor:
        """``t`` where the copy waits: itself, or a copy in host memory."""
        return self._like(t).copy_(t) if self.location == "host" else t

    @torch.no_grad()
    def restore_(self) -> None:
        """Write the tensors back, bit for bit; the copy on a device is let go of."""
        torch.clear_autocast_cache()  # an enclosing autocast holds what they were until now, cast
        if self._masters is not None:
            with span("restore", [*self.tensors, *self._masters], 1):
                for t, m in zip(self.tensors, self._masters, strict=True):
                    t.copy_(m)
            return
        if self._copy is None:
            raise RuntimeError("snapshot: restore_ before take")
        with span("restore", self.tensors, 2):
            copy_(self.tensors, self._copy)
            _synchronize(self.tensors, self.location)
            if self.location == "device":
                self._copy = None


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality that tells -0 from 0 and takes a NaN for itself."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


def _synchronize(tensors: Sequence[Tensor], location: str) -> None:
    """Copies between pinned memory and a GPU are asynchronous; the tensors are about to be written to."""
    if location == "host":
        for device in {t.device for t in tensors if t.device.type == "cuda"}:
            torch.cuda.current_stream(device).synchronize()
