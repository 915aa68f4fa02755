"""Streaming class moments of the stream: one tap a layer, no activation kept, no loss however many samples come."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastguard.ops.class_moments import class_moments_
from fastguard.ops.precision import accumulation_dtype


@dataclass
class _State:
    """What ``class_moments_`` writes for one layer; the rests are None in float64."""

    count: Tensor
    mean: Tensor
    mean_rest: Tensor | None
    second: Tensor | None
    second_rest: Tensor | None

    def sums(self) -> Tensor:
        """Sums of rows and, where second moments are taken, of their squares [1 or 2, classes, P, D] in float64."""
        n = self.count[:, None, None].double()
        mean = self.mean.double() + (0.0 if self.mean_rest is None else self.mean_rest.double())
        if self.second is None:
            return (n * mean)[None]
        spread = self.second.double() + (0.0 if self.second_rest is None else self.second_rest.double())
        return torch.stack([n * mean, spread + n * mean.square()])


class Moments:
    """First and second moments of rows [P, D] in each of several classes, at each of several layers.

    In pairs of fp32 (float64 for float64 rows), where the rows are.

    Args:
        classes, layers: how many.
        second: means of squares too.
    """

    def __init__(self, classes: int, layers: int, second: bool = False) -> None:
        self.classes, self.layers, self.second = classes, layers, second
        self.counts = [0] * classes
        self._states: list[_State | None] = [None] * layers
        self._sums: list[Tensor] = []
        self._dtype = torch.float32

    def add(self, kind: int, layer: int, rows: Tensor) -> None:
        """Add rows [B, P, D] of class ``kind``; the samples are counted at layer 0."""
        state = self._states[layer]
        if state is None:
            self._dtype = accumulation_dtype(rows.dtype)
            pair = self._dtype == torch.float32

            def zeros() -> Tensor:
                return rows.new_zeros(self.classes, *rows.shape[1:], dtype=self._dtype)

            count = torch.zeros(self.classes, dtype=torch.int64, device=rows.device)
            state = _State(
                count,
                zeros(),
                zeros() if pair else None,
                zeros() if self.second else None,
                zeros() if self.second and pair else None,
            )
            self._states[layer] = state
        label = torch.full(rows.shape[:1], kind, device=rows.device)
        class_moments_(
            state.count, state.mean, state.mean_rest, rows, label, second=state.second, second_rest=state.second_rest
        )
        if layer == 0:
            self.counts[kind] += rows.shape[0]

    def reduce(self, device: torch.device) -> None:
        """Sum counts and sums over the ranks of the job; every rank calls it, also one that saw no sample."""
        counts = torch.tensor(self.counts, device=device, dtype=torch.int64)
        torch.distributed.all_reduce(counts)
        self.counts = counts.tolist()
        known = next((state for state in self._states if state is not None), None)
        found = [0, 0, 0] if known is None else [*known.mean.shape[1:], self._dtype == torch.float64]
        common = torch.tensor(found, dtype=torch.int64, device=device)
        torch.distributed.all_reduce(common, op=torch.distributed.ReduceOp.MAX)
        rows, width, exact = common.tolist()
        self._dtype = torch.float64 if exact else torch.float32
        for state in self._states:
            nothing = torch.zeros(1 + self.second, self.classes, rows, width, dtype=torch.float64, device=device)
            whole = nothing if state is None else state.sums()
            torch.distributed.all_reduce(whole)
            self._sums.append(whole)

    def mean(self, kind: int, order: int = 1) -> Tensor:
        """First or second moments [P, layers, D] of a class, on the CPU; the class has samples."""
        sums = self._sums or [state.sums() for state in self._states if state is not None]
        return torch.stack([(each[order - 1, kind] / self.counts[kind]).to(self._dtype).cpu() for each in sums], 1)
