"""``add_project_rms_norm`` on CPU: csrc/cpu/projection.cpp, a few rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from fastguard import _extension
from fastguard.ops.precision import accumulation_dtype

_extension.load()

PARTS = 32
"""Most parts of the rows that sum the gradients of weight and bias apart, whatever the number of threads."""


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
    """See ``portable.forward``."""
    torch.ops.fastguard_c.add_project_rms_norm(
        residual, update, basis, index, weight, bias, eps, scale, kind, stream, out
    )


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
    """See ``portable.backward``."""
    n, width = stream.shape
    partial = torch.zeros(min(n, PARTS), 2, width, dtype=accumulation_dtype(stream.dtype))
    torch.ops.fastguard_c.add_project_rms_norm_backward(
        grad_stream, grad_normed, stream, basis, index, weight, eps, scale, kind, dh, partial
    )
    dweight, dbias = partial.sum(0)
    return dweight, dbias
