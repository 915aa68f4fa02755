"""``add_project_rms_norm`` in plain PyTorch, by tiles of rows.

Shapes: N rows, D features, G bases of K directions; index [N / each] gives the basis of ``each`` consecutive rows, -1
for none. kind: 0 rms, 1 rms_offset, 2 layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastguard.ops.precision import accumulation_dtype
from fastguard.ops.project_out.portable import index_of, rest, tiles

RMS, RMS_OFFSET, LAYER = range(3)


def factor(weight: Tensor | None, kind: int, wide: torch.dtype) -> Tensor | float:
    """What a normed feature is multiplied with."""
    if weight is None:
        return 1.0
    return weight.to(wide) + 1 if kind == RMS_OFFSET else weight.to(wide)


def normed(h: Tensor, eps: float, kind: int) -> tuple[Tensor, Tensor]:
    """Rows h [R, D] normed, and the inverse deviation [R, 1] that they were multiplied with."""
    centred = h - h.mean(-1, keepdim=True) if kind == LAYER else h
    inverse = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return centred * inverse, inverse


def forward(
    residual: Tensor,
    update: Tensor,
    basis: Tensor | None,
    index: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: float,
    kind: int,
    stream: Tensor,
    out: Tensor,
) -> None:
    """Write the new stream and its norm [N, D]; residual, update: [N, D]; basis: [G, K, D] in the wide dtype, or None.

    The norm is of the stream as it is stored, rounded to its dtype.
    """
    wide = accumulation_dtype(residual.dtype)
    by = factor(weight, kind, wide)
    for rows in tiles(residual):
        h = residual[rows].to(wide) + update[rows].to(wide)
        if basis is not None:
            h = rest(h, basis, index_of(index, rows, residual.shape[0]), scale)
        stream[rows] = h.to(stream.dtype)
        y = normed(stream[rows].to(wide), eps, kind)[0] * by
        out[rows] = (y if bias is None else y + bias.to(wide)).to(out.dtype)


def backward(
    grad_stream: Tensor | None,
    grad_normed: Tensor | None,
    stream: Tensor,
    basis: Tensor | None,
    index: Tensor | None,
    weight: Tensor | None,
    eps: float,
    scale: float,
    kind: int,
    need_weight: bool,
    dh: Tensor,
) -> tuple[Tensor, Tensor]:
    """Write dh [N, D], the gradient at residual + update; return those of weight and bias [D] in the wide dtype.

    grad_stream, grad_normed: [N, D], one of them may be None. need_weight: whether either of what is returned is used.
    """
    wide = accumulation_dtype(stream.dtype)
    by = factor(weight, kind, wide)
    dweight, dbias = (torch.zeros(stream.shape[1], dtype=wide, device=stream.device) for _ in range(2))
    for rows in tiles(stream):
        total = torch.zeros((), dtype=wide, device=stream.device)
        if grad_normed is not None:
            g = grad_normed[rows].to(wide)
            u, inverse = normed(stream[rows].to(wide), eps, kind)
            if need_weight:
                dweight += (g * u).sum(0)
                dbias += g.sum(0)
            g = g * by
            total = g - u * (g * u).mean(-1, keepdim=True)
            if kind == LAYER:
                total = total - g.mean(-1, keepdim=True)
            total = total * inverse
        if grad_stream is not None:
            total = total + grad_stream[rows].to(wide)
        if basis is not None:
            total = rest(total, basis, index_of(index, rows, stream.shape[0]), scale)
        dh[rows] = total.to(dh.dtype)
    return dweight, dbias
