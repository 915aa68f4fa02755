"""Gradients at logits in float16, whose range is narrow: what is under 6e-5 loses digits, and under 6e-8 is zero.

A logit's gradient is its row's upstream gradient times a probability, and half of a row's mass may lie on columns of
1e-6 each. The backward is linear in the upstream gradients: they are raised so far that no logit's gradient can pass
float16's end, and what is made of them is brought down again, by a power of two, so that neither rounds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastguard.ops.lm_head_stats.op import Grads

TOP = 8
"""The largest upstream gradient is raised to 2^TOP; 2^16 leaves room for sums of them and |1 + z - mean|."""


def raised(grads: Grads, scale: float, dtype: torch.dtype) -> tuple[Grads, Tensor | None]:
    """(gradients times a power of two, its inverse [] on the device) for float16; else they themselves, and None.

    scale: what a logit's gradient is multiplied by on its way to the raw product.
    """
    given = [g for g in grads if g is not None]
    if dtype != torch.float16 or not given[0].numel():
        return grads, None
    largest = torch.stack([g.abs().amax() for g in given]).amax() * abs(scale)
    exponent = (TOP - largest.log2().ceil()).clamp(-100, 100)
    power = torch.where(largest.isfinite() & (largest > 0), exponent.exp2(), 1.0)
    return Grads(*(None if g is None else g * power for g in grads)), 1 / power
