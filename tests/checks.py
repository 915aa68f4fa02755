"""What "agrees with the reference" means in this suite.

What it means stands in ``fastguard.bench.agreement``: a bound on the largest error, by that of plain PyTorch of the
same dtype, and one on the ratio RMS(error) / RMS(reference).

`assert_agrees` is itself tested by `assert_catches_spoiled`: the very same assertion must fail once the
tensor is zeroed, halved, has its rows shuffled or one column off.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastguard.bench.agreement import disagreement


def assert_agrees(
    name: str,
    actual: Tensor,
    reference: Tensor,
    same_dtype: Tensor | None = None,
    k: float = 3.0,
    ulps: float = 32.0,
    ratio: float | None = None,
) -> None:
    """Assert that nothing is wrong with ``actual``: see ``fastguard.bench.agreement``, which GPUs are held to."""
    wrong = disagreement(actual, reference, same_dtype, k, ulps, ratio)
    assert wrong is None, f"{name}: {wrong}"


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
