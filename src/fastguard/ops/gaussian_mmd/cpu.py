"""``gaussian_mmd`` on CPU: csrc/cpu/gaussian_mmd.cpp reads x and makes noise; the 2B x 2B matrices are torch's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastguard import _extension
from fastguard.ops.gaussian_mmd.portable import Source, coefficients, mmd_of
from fastguard.ops.precision import accumulation_dtype

_extension.load()


def _arguments(x: Tensor, mask: Tensor | None, source: Source) -> tuple[Any, ...]:
    wide = accumulation_dtype(x.dtype)
    noise = None if source.explicit is None else source.explicit.to(wide).contiguous()
    return x, mask, noise, source.seed, int(source.call), source.layer, source.sample_offset


def forward(x: Tensor, mask: Tensor | None, source: Source) -> tuple[Tensor, Tensor]:
    """See ``portable.forward``."""
    wide = accumulation_dtype(x.dtype)
    gram = torch.empty(x.shape[0], 2 * x.shape[1], 2 * x.shape[1], dtype=wide)
    torch.ops.fastguard_c.gaussian_mmd_gram(*_arguments(x, mask, source), gram)
    return mmd_of(gram), gram


def backward(grad: Tensor, x: Tensor, mask: Tensor | None, source: Source, gram: Tensor) -> Tensor:
    """See ``portable.backward``."""
    dx = torch.empty(x.shape, dtype=x.dtype)
    c = coefficients(gram, grad).contiguous()
    torch.ops.fastguard_c.gaussian_mmd_gradient(*_arguments(x, mask, source), c, dx)
    return dx
