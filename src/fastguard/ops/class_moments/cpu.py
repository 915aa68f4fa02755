"""``class_moments_`` on CPU: csrc/cpu/class_moments.cpp, all classes in one pass over positions and features."""

from __future__ import annotations

import torch
from torch import Tensor

from fastguard import _extension

_extension.load()


def update(
    count: Tensor,
    mean: Tensor,
    mean_rest: Tensor | None,
    second: Tensor | None,
    second_rest: Tensor | None,
    x: Tensor,
    label: Tensor,
    positions: Tensor,
) -> None:
    """See ``portable.update``."""
    torch.ops.fastguard_c.class_moments(count, mean, mean_rest, second, second_rest, x, label, positions)
