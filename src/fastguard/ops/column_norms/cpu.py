"""``column_norms_`` on CPU: csrc/cpu/column_norms.cpp, one pass over x."""

from __future__ import annotations

import torch
from torch import Tensor

from fastguard import _extension

_extension.load()


def squares(x: Tensor, bounds: Tensor, out: Tensor) -> None:
    """See ``portable.squares``."""
    torch.ops.fastguard_c.column_norms(x, bounds, out)
