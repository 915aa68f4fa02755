"""Rows of ``lm_head_stats`` all of whose columns are computed; their products may be kept for the backward.

The backward goes by blocks of the vocabulary where the forward goes by tiles of rows: each block of the head is read
once for all rows, each block of its gradient written once, and the block of logits stays in the cache between the
products that make and read it. Kept products are read instead of made: 4 N D V flops instead of 6 N D V.

Shapes: N rows, V vocabulary, D hidden size, C columns of a block.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from fastguard.ops.lm_head_stats import half
from fastguard.ops.lm_head_stats.op import TILE, Grads, Row, Saved
from fastguard.ops.precision import accumulation_dtype
from fastguard.ops.vocabulary import Head

BLOCK = {"cpu": (2**20, 256)}
"""By type of device, logits of a block, and its columns at least, however many rows there are."""

LARGE_BLOCK = 2**26, 1024
"""On others: the whole device must be busy, and dx is read and written once a block."""


class Kernels(Protocol):
    """The element-wise work: see ``portable.TileKernels``, which is more."""

    def statistics(
        self, z: Tensor, head: Head, target: Tensor, filter_tol: float, with_mean: bool, columns: Tensor | None
    ) -> Row:
        """Reduce raw products z [R, V]."""

    def gradient(
        self, z: Tensor, head: Head, index: Tensor | None, target: Tensor, row: Saved, grads: Grads, out: Tensor
    ) -> object:
        """Write the gradient at raw products z [N, C] of the head's own columns to out, which may be z."""


def forward(x: Tensor, head: Head, target: Tensor, with_mean: bool, kept: Tensor, *, kernels: Kernels) -> Row:
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
    kernels: Kernels,
) -> Tensor | None:
    """dx [N, D] in the accumulation dtype (None unless needed); adds to dweight [V, D] and dbias [V] if given.

    kept: raw products [N, V], which are left as they are, or None to make them again. overwrite: dweight holds nothing
    yet.
    """
    x = x.contiguous()
    (n, _), (classes, _) = x.shape, head.weight.shape
    grads, shrink = half.raised(grads, head.scale, x.dtype)
    dx = torch.zeros(x.shape, dtype=accumulation_dtype(x.dtype), device=x.device) if need_hidden else None
    elements, narrowest = BLOCK.get(x.device.type, LARGE_BLOCK)
    width = min(max(elements // max(n, 1) // 128 * 128, narrowest), classes)
    buffer = torch.empty(n * width, dtype=x.dtype, device=x.device)
    for start in range(0, classes, width):
        columns = slice(start, min(start + width, classes))
        w = head.weight[columns]
        d = buffer[: n * len(w)].view(n, len(w))
        z = product(x, w.t(), out=d) if kept is None else kept[:, columns]
        block = replace(head, weight=w, bias=None if head.bias is None else head.bias[columns])
        kernels.gradient(z, block, None, target - start, saved, grads, d)
        if dx is not None:
            add_product(dx, d, w)
        if dweight is not None and overwrite and shrink is not None:
            torch.mul(product(d.t(), x), shrink, out=dweight[columns])
        elif dweight is not None and overwrite and dweight.dtype == d.dtype:
            torch.mm(d.t(), x, out=dweight[columns])
        elif dweight is not None and overwrite:
            dweight[columns] = product(d.t(), x)
        elif dweight is not None:
            add_product(dweight[columns], d.t(), x, shrink)
        if dbias is not None:
            summed = d.sum(0, dtype=dbias.dtype)
            dbias[columns].add_(summed if shrink is None else summed * shrink)
    return dx if dx is None or shrink is None else dx.mul_(shrink)


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b, in out if given and not wider: half precision widens to fp32 on NVIDIA GPUs, float16 everywhere."""
    if a.is_cuda and torch.version.hip is None and a.element_size() == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float() if a.dtype == torch.float16 else torch.mm(a, b, out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor, shrink: Tensor | None = None) -> None:
    """total += a @ b (times shrink), widened where the product's dtype is narrower."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif shrink is None:
        total.add_(product(a, b))
    else:
        total.addcmul_(product(a, b), shrink)
