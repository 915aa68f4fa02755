"""``project_out`` on CPU: csrc/cpu/projection.cpp, a few rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from fastguard import _extension

_extension.load()


def forward(x: Tensor, basis: Tensor, index: Tensor | None, scale: float, preserve: bool, out: Tensor) -> None:
    """See ``portable.forward``."""
    torch.ops.fastguard_c.project_out(x, basis, index, scale, preserve, out)


def backward(grad: Tensor, x: Tensor, basis: Tensor, index: Tensor | None, scale: float, dx: Tensor) -> None:
    """See ``portable.backward``."""
    torch.ops.fastguard_c.project_out_backward(grad, x, basis, index, scale, dx)
