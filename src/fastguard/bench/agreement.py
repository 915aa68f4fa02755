"""When a tensor is as good an answer as same-dtype PyTorch's, both measured against a float64 reference.

Two conditions hold together:

* elementwise, the error is at most ``k`` times the largest that plain PyTorch of the same dtype makes against the same
  reference, plus a few ulps of the tensor's scale, for dtypes in which PyTorch happens to be exact;
* so is RMS(error) / RMS(reference), which no absolute tolerance can hide behind.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def rms(x: Tensor) -> float:
    """The root of the mean square, 0 of nothing."""
    return float(x.double().pow(2).mean().sqrt()) if x.numel() else 0.0


def disagreement(
    actual: Tensor,
    reference: Tensor,
    same_dtype: Tensor | None = None,
    k: float = 3.0,
    ulps: float = 32.0,
    ratio: float | None = None,
) -> str | None:
    """What is wrong with ``actual``; None where it agrees with the float64 ``reference`` of its shape.

    same_dtype: plain PyTorch's answer in the dtype of actual. ratio: bound on RMS(error) / RMS(reference); by default
    ``ulps`` units in the last place of the dtype.
    """
    if actual.shape != reference.shape:
        return f"shape {tuple(actual.shape)} != {tuple(reference.shape)}"
    if not torch.isfinite(actual).all():
        return "not finite"
    if reference.numel() == 0:
        return None
    eps = EPS[actual.dtype]
    error = (actual.double() - reference.double()).abs()
    largest, scale = float(error.max()), float(reference.double().abs().max())
    peer = same_dtype.double() - reference.double() if same_dtype is not None else torch.zeros(1)
    bound = k * float(peer.abs().max()) + ulps * eps * scale
    if not largest <= bound:
        return f"max error {largest:.3e} > {bound:.3e} (peer {float(peer.abs().max()):.3e})"
    norm = max(rms(reference), 1e-300)
    bound, measured = max(ulps * eps if ratio is None else ratio, k * rms(peer) / norm), rms(error) / norm
    return None if measured <= bound else f"RMS ratio {measured:.3e} > {bound:.3e}"
