"""Streaming class moments of the stream: one tap a layer, no activation kept, no loss however many samples come."""

from __future__ import annotations

import torch
from torch import Tensor

from fastguard.ops.precision import accumulation_dtype


class Moments:
    """Sums over samples of rows [P, D] in each of several classes, at each of several layers.

    In fp32 (float64 for float64 rows) with Neumaier's compensation, where the rows are: the error of a sum does not
    grow with the number of batches.

    Args:
        classes, layers: how many.
        second: sum squares too.
    """

    def __init__(self, classes: int, layers: int, second: bool = False) -> None:
        self.classes, self.layers, self.second = classes, layers, second
        self.counts = [0] * classes
        self._sums: list[Tensor | None] = [None] * layers

    def add(self, kind: int, layer: int, rows: Tensor) -> None:
        """Add rows [B, P, D] of class ``kind``; the samples are counted at layer 0."""
        wide = rows.to(accumulation_dtype(rows.dtype))
        held = self._sums[layer]
        if held is None:  # [classes, first and second moment, sum and what it lost, P, D]
            held = wide.new_zeros(self.classes, 1 + self.second, 2, *wide.shape[1:])
            self._sums[layer] = held
        for order in range(1 + self.second):
            total, lost = held[kind, order]
            exact = (wide.square() if order else wide).sum(0, dtype=torch.float64)
            added = exact.to(total.dtype)
            after = total + added
            lost += (exact - added).to(total.dtype)
            lost += torch.where(total.abs() >= added.abs(), (total - after) + added, (added - after) + total)
            total.copy_(after)
        if layer == 0:
            self.counts[kind] += rows.shape[0]

    def reduce(self, device: torch.device) -> None:
        """Sum counts and sums over the ranks of the job; every rank calls it, also one that saw no sample."""
        counts = torch.tensor(self.counts, device=device, dtype=torch.int64)
        torch.distributed.all_reduce(counts)
        self.counts = counts.tolist()
        known = next((held for held in self._sums if held is not None), None)
        found = [0, 0, 0] if known is None else [*known.shape[-2:], known.dtype == torch.float64]
        common = torch.tensor(found, dtype=torch.int64, device=device)
        torch.distributed.all_reduce(common, op=torch.distributed.ReduceOp.MAX)
        rows, width, exact = common.tolist()
        for layer, held in enumerate(self._sums):
            if held is None:
                dtype = torch.float64 if exact else torch.float32
                held = torch.zeros(self.classes, 1 + self.second, 2, rows, width, dtype=dtype, device=device)
            whole = held.double().sum(2)
            torch.distributed.all_reduce(whole)
            total = whole.to(held.dtype)
            self._sums[layer] = torch.stack([total, (whole - total.double()).to(held.dtype)], 2)

    def mean(self, kind: int, order: int = 1) -> Tensor:
        """First or second moments [P, layers, D] of a class, on the CPU; the class has samples."""
        found = []
        for held in self._sums:
            assert held is not None
            found.append((held[kind, order - 1].double().sum(0) / self.counts[kind]).to(held.dtype).cpu())
        return torch.stack(found, 1)
