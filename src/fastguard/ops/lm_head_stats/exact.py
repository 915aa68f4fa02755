"""Rows of ``lm_head_stats`` all of whose columns are computed; their products may be kept for the backward.

The backward goes by blocks of the vocabulary where the forward goes by tiles of rows: each block of the head is read
once for all rows, each block of its gradient written once, and the block of logits stays in the cache between the
products that make and read it. Kept products are read instead of made: 4 N D V flops instead of 6 N D V.

Shapes: N rows, V vocabulary, D hidden size, C columns of a block.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastguard.ops.lm_head_stats.op import TILE, Grads, Row, Saved
from fastguard.ops.precision import accumulation_dtype
from fastguard.ops.vocabulary import Head

if TYPE_CHECKING:
    from fastguard.ops.lm_head_stats.portable import TileKernels

BLOCK = 2**20
"""Logits of a block."""

NARROWEST = 256
"""Columns of a block at least, however many rows there are."""


def forward(x: Tensor, head: Head, target: Tensor, with_mean: bool, kept: Tensor, *, kernels: TileKernels) -> Row:
    """The statistics of x [N, D]; leaves its raw products in kept [N, V]."""
    torch.mm(x, head.weight.t(), out=kept)
    tiles = zip(kept.split(TILE), target.split(TILE), strict=True)
    rows = [kernels.statistics(z, head, t, 0.0, with_mean, None) for z, t in tiles]
    return Row(*map(torch.cat, zip(*rows, strict=True)))


def backward(
    grads: Grads,
    x: Tensor,
    head: Head,
    target: Tensor,
    saved: Saved,
    kept: Tensor | None,
    need_hidden: bool,
    dweight: Tensor | None,
    dbias: Tensor | None,
    *,
    overwrite: bool = False,
    kernels: TileKernels,
) -> Tensor | None:
    """dx [N, D] in the accumulation dtype (None unless needed); adds to dweight [V, D] and dbias [V] if given.

    kept: raw products [N, V], which are left as they are, or None to make them again. overwrite: dweight holds nothing
    yet.
    """
    x = x.contiguous()
    (n, _), (classes, _) = x.shape, head.weight.shape
    dx = torch.zeros(x.shape, dtype=accumulation_dtype(x.dtype), device=x.device) if need_hidden else None
    width = min(max(BLOCK // max(n, 1), NARROWEST), classes)
    buffer = torch.empty(n * width, dtype=x.dtype, device=x.device)
    for start in range(0, classes, width):
        columns = slice(start, min(start + width, classes))
        w = head.weight[columns]
        d = buffer[: n * len(w)].view(n, len(w))
        if kept is None:
            torch.mm(x, w.t(), out=d)
        else:
            d.copy_(kept[:, columns])
        block = replace(head, weight=w, bias=None if head.bias is None else head.bias[columns])
        kernels.gradient(d, block, None, target - start, saved, grads)
        if dx is not None:
            add_product(dx, d, w)
        if dweight is not None and overwrite and dweight.dtype == d.dtype:
            torch.mm(d.t(), x, out=dweight[columns])
        elif dweight is not None and overwrite:
            dweight[columns] = d.t() @ x
        elif dweight is not None:
            add_product(dweight[columns], d.t(), x)
        if dbias is not None:
            dbias[columns].add_(d.sum(0, dtype=dbias.dtype))
    return dx


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, widened where the product's dtype is narrower."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)
