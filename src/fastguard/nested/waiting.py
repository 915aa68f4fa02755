"""The training optimizer's states, in host memory for as long as a simulated attack needs the room.

Between two of its steps nobody reads an optimizer's states, and an attack lasts most of that time. Their memory on the
device is given up and had again; the tensors stay the same objects, so that the optimizer notices nothing. Cost: their
bytes once over the bus in each direction.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastguard.nested.guard import Restoring
from fastguard.nested.profile import span


class Waiting:
    """States of ``optimizer`` that can wait in host memory (pinned, where they come from a GPU).

    Args:
        optimizer: torch's, or accelerate's around it; between its steps. Shards of FSDP2 wait as each rank has them.
        budget: bytes of them that may stay where they are. What a tensor shares its memory with stays in any case.

    Raises:
        ValueError: a negative budget; an optimizer whose steps a CUDA graph may hold the addresses of (capturable).
    """

    def __init__(self, optimizer: Any, budget: int = 0) -> None:
        if isinstance(budget, bool) or not isinstance(budget, int) or budget < 0:
            raise ValueError(f"budget: expected bytes, an int >= 0, got {budget!r}")
        if any(group.get("capturable") for group in optimizer.param_groups):
            raise ValueError("optimizer: expected capturable=False, since states that return have other addresses")
        self.optimizer, self.budget = optimizer, budget
        self._host: dict[int, Tensor] = {}

    @contextlib.contextmanager
    def away(self) -> Iterator[int]:
        """The states, beyond the budget, wait inside; yields how many bytes. They are back whatever is raised."""
        moved: list[tuple[Tensor, Tensor]] = []

        def restore(_: bool) -> None:
            with span("waiting states", [host for _, host in moved], 2):
                for state, host in moved:
                    state.untyped_storage().resize_(host.numel() * host.element_size())
                    state.copy_(host, non_blocking=True)  # in the order of the stream, as the step that reads it

        with Restoring() as guard:
            guard.on_exit(restore)
            states = self._beyond()
            with span("waiting states", states, 2):
                for i, state in enumerate(states):
                    host = self._buffer(i, state)
                    host.copy_(state, non_blocking=True)
                    moved.append((state, host))
                    state.untyped_storage().resize_(0)
            guard.release()
            yield sum(host.numel() * host.element_size() for _, host in moved)

    def _beyond(self) -> list[Tensor]:
        """Those that do not fit into the budget, which the smallest fill."""
        given = [value for state in self.optimizer.state.values() for value in state.values()]
        tensors = [getattr(t, "_local_tensor", t) for t in given if isinstance(t, Tensor) and t.dim() > 0]
        left, found = self.budget, []
        for t in sorted(tensors, key=lambda t: t.numel() * t.element_size()):
            size = t.numel() * t.element_size()
            left -= size
            if left < 0 and t.is_contiguous() and t.untyped_storage().nbytes() == size:
                found.append(t)
        return found

    def _buffer(self, i: int, state: Tensor) -> Tensor:
        """Host memory for the i-th, kept from attack to attack."""
        kept = self._host.get(i)
        if kept is None or (kept.shape, kept.dtype) != (state.shape, state.dtype):
            kept = self._host[i] = torch.empty(
                state.shape, dtype=state.dtype, device="cpu", pin_memory=state.device.type == "cuda"
            )
        return kept
