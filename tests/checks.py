"""What "agrees with the reference" means in this suite.

Two conditions hold together, per tensor:

* elementwise, the error against the float64 reference is at most ``k`` times the largest error that plain
  PyTorch of the same dtype makes against the same reference (plus a floor of a few ulps of the tensor's
  scale, for dtypes in which PyTorch happens to be exact);
* the ratio RMS(error) / RMS(reference), which no absolute tolerance can hide behind.

`assert_agrees` is itself tested by `assert_catches_spoiled`: the very same assertion must fail once the
tensor is zeroed, halved, has its rows shuffled or one column off.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

EPS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def rms(x: Tensor) -> float:
    return float(x.double().pow(2).mean().sqrt()) if x.numel() else 0.0


def assert_agrees(
    name: str,
    actual: Tensor,
    reference: Tensor,
    same_dtype: Tensor | None = None,
    k: float = 3.0,
    ulps: float = 32.0,
    ratio: float | None = None,
) -> None:
    """Assert that ``actual`` is as good an answer as same-dtype PyTorch, measured against float64 ``reference``.

    ratio: bound on RMS(error)/RMS(reference); by default ``ulps`` units in the last place of the dtype.
    """
    assert actual.shape == reference.shape, f"{name}: shape {tuple(actual.shape)} != {tuple(reference.shape)}"
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    if reference.numel() == 0:
        return
    eps = EPS[actual.dtype]
    error = (actual.double() - reference.double()).abs()
    scale = float(reference.double().abs().max())
    peer = float((same_dtype.double() - reference.double()).abs().max()) if same_dtype is not None else 0.0
    bound = k * peer + ulps * eps * scale
    assert float(error.max()) <= bound, f"{name}: max error {float(error.max()):.3e} > {bound:.3e} (peer {peer:.3e})"
    bound_ratio = ulps * eps if ratio is None else ratio
    if same_dtype is not None:
        bound_ratio = max(bound_ratio, k * rms(same_dtype.double() - reference.double()) / max(rms(reference), 1e-300))
    measured = rms(error) / max(rms(reference), 1e-300)
    assert measured <= bound_ratio, f"{name}: RMS ratio {measured:.3e} > {bound_ratio:.3e}"


def spoiled(x: Tensor) -> dict[str, Tensor]:
    """Wrong versions of a tensor that a test must not accept."""
    out = {"zeroed": torch.zeros_like(x), "halved": x / 2}
    if x.dim() and x.shape[0] > 1:
        out["shuffled"] = x.roll(1, 0)
    if x.dim() > 1 and x.shape[-1] > 1:
        off = x.clone()
        off[..., 0] = x[..., 1]
        out["one column off"] = off
    return out


def assert_catches_spoiled(check: Callable[[Tensor], None], x: Tensor) -> None:
    """The assertion that accepted ``x`` must reject every spoiled version of it."""
    check(x)
    for kind, wrong in spoiled(x).items():
        with pytest.raises(AssertionError):
            check(wrong)
            pytest.fail(f"a {kind} tensor passes the assertion", pytrace=False)
