"""``abs_weight_grad_`` on CPU: csrc/cpu/abs_weight_grad.cpp, each sample's gradient in registers alone."""

from __future__ import annotations

import torch
from torch import Tensor

from fastguard import _extension

_extension.load()


def update(
    score: Tensor | None,
    squared: Tensor | None,
    signed: Tensor | None,
    grad_out: Tensor,
    input: Tensor,
    bounds: Tensor,
) -> None:
    """See ``portable.update``."""
    torch.ops.fastguard_c.abs_weight_grad(score, squared, signed, grad_out, input, bounds)
