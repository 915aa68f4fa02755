"""``gram_`` in plain PyTorch: half of the matrix by products of block rows, the other half copied from it.

Shapes: N rows of B samples, I features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

BLOCK = {"cpu": 192, "other": 1024}
"""Rows of the matrix made by one product: few enough to save nearly half, enough for the full rate."""
ROWS = 2048
"""Rows of x copied at a time, where they are not in one run or not in the dtype of the arithmetic."""


def add(gram: Tensor, x: Tensor, bounds: Tensor, mirror: Callable[[Tensor], None] | None = None) -> None:
    """Add the products of the rows of x [N, I] within bounds [B, 2] to ``gram`` [I, I], in the dtype of gram.

    mirror: copies the lower half to the upper; the one below if None.
    """
    block, width = BLOCK.get(x.device.type, BLOCK["other"]), gram.shape[0]
    for rows in chosen(x, bounds):
        wide = rows.to(gram.dtype)
        for start in range(0, width, block):
            end = min(start + block, width)
            # summed by itself first: some BLAS adds small products to the matrix row by row, a rounding each
            gram[start:end, :end] += wide[:, start:end].mT @ wide[:, :end]
    (mirror or _mirror)(gram)


def chosen(x: Tensor, bounds: Tensor) -> Iterator[Tensor]:
    """The rows of x [N, I] within bounds, a tile at a time; views where all are in one run."""
    begin, end = bounds.unbind(1)
    number = end - begin
    total = int(number.sum())
    first = begin - (number.cumsum(0) - number)  # of a sample, less how many rows went before
    run = int(begin[0]) if bool((begin[1:] == end[:-1]).all()) else None
    for start in range(0, total, ROWS):
        stop = min(start + ROWS, total)
        if run is not None:
            yield x[run + start : run + stop]
        else:
            at = torch.arange(start, stop, device=x.device)
            sample = torch.searchsorted(number.cumsum(0), at, right=True)
            yield x[at + first[sample]]


def _mirror(gram: Tensor) -> None:
    block = BLOCK.get(gram.device.type, BLOCK["other"])
    for start in range(0, gram.shape[0], block):
        end = min(start + block, gram.shape[0])
        square = gram[start:end, start:end]
        square.copy_(square.tril() + square.tril(-1).mT)
        gram[:start, start:end] = gram[start:end, :start].mT
