"""In what precision ops accumulate and keep statistics."""

from __future__ import annotations

import torch

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""What the ops take, unless they say otherwise."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for everything but float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
