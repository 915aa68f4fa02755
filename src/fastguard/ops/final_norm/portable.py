"""``final_norm`` in plain PyTorch, forward and backward, without keeping the normed rows.

Kinds: ``none`` (gather only), ``rms`` (w * x / rms(x)), ``rms_offset`` ((1 + w) * x / rms(x), Gemma) and
``layer`` (layer norm, with bias if there is one). Statistics are taken in fp32, in float64 for float64 inputs,
as transformers' modules take them. Shapes: M rows of the source, N gathered rows, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastguard.ops.vocabulary import Norm


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def forward(source: Tensor, rows: Tensor | None, norm: Norm, dtype: torch.dtype) -> Tensor:
    """Normed rows [N, D] of ``source`` [M, D]: rounded to its dtype, as a model's norm rounds, then to ``dtype``."""
    return apply(source if rows is None else source.index_select(0, rows), norm).to(dtype)


def apply(x: Tensor, norm: Norm) -> Tensor:
    """The norm of rows x [..., D] in their dtype; differentiable."""
    if norm.kind == "none":
        return x
    wide = _wide(x)
    if norm.kind == "layer":
        w = None if norm.weight is None else _wide(norm.weight)
        b = None if norm.bias is None else _wide(norm.bias)
        return torch.nn.functional.layer_norm(wide, wide.shape[-1:], w, b, norm.eps).to(x.dtype)
    unit = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)
    if norm.weight is None:
        return unit.to(x.dtype)
    if norm.kind == "rms_offset":
        return (unit * (1.0 + _wide(norm.weight))).to(x.dtype)
    return norm.weight.to(x.dtype) * unit.to(x.dtype)  # Llama rounds before it scales


def backward(
    grad: Tensor, source: Tensor, rows: Tensor | None, norm: Norm
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of the source [M, D] (zero outside ``rows``, none of them twice), the norm's weight [D] and bias [D].

    grad: [N, D], the gradient of the normed rows, in the accumulation dtype.
    """
    if norm.kind == "none":
        dx, dw, db = grad, None, None
    else:
        x = _wide(source if rows is None else source.index_select(0, rows))
        if norm.kind == "layer":
            mean = x.mean(-1, keepdim=True)
            x = x - mean
        r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps)
        unit = x * r
        dw = (grad * unit).sum(0) if norm.weight is not None else None
        db = grad.sum(0) if norm.bias is not None else None
        if norm.weight is not None:
            grad = grad * (_wide(norm.weight) + 1.0 if norm.kind == "rms_offset" else _wide(norm.weight))
        dx = grad - unit * (grad * unit).mean(-1, keepdim=True)
        if norm.kind == "layer":
            dx = dx - grad.mean(-1, keepdim=True)
        dx = dx * r
    dx = dx.to(source.dtype)
    if rows is not None:
        dx = torch.zeros_like(source, memory_format=torch.contiguous_format).index_copy_(0, rows, dx)
    return dx, dw, db
