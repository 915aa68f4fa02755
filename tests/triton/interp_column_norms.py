"""The GPU kernel of ``column_norms_`` in Triton's interpreter, against the float64 specification.

Run by tests/test_triton.py with TRITON_INTERPRET=1 and FASTGUARD_BACKEND=triton in a process of its own.
"""

from __future__ import annotations

import os

import pytest
import torch

from checks import assert_agrees, assert_catches_spoiled
from fastguard.ops.column_norms import column_norms_, reference

if os.environ.get("TRITON_INTERPRET") != "1" or os.environ.get("FASTGUARD_BACKEND") != "triton":
    pytest.skip("needs TRITON_INTERPRET=1 and FASTGUARD_BACKEND=triton", allow_module_level=True)

from fastguard.ops.column_norms import triton as ops

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("parts", [1, 3])
def test_matches_reference(dtype, parts, monkeypatch):
    """Samples of less than a tile, of none, of several chunks; rows that are no one's hold NaN."""
    monkeypatch.setattr(ops, "MAX_PARTS", parts)
    monkeypatch.setattr(ops, "STEPS", 2)
    chunk = ops.ROWS * ops.STEPS
    ends = torch.tensor([5, 5, 8 * chunk + 3, 8 * chunk + 4]) + torch.tensor([0, 2, 4, 6])
    begins = torch.tensor([0, 7, 9, 8 * chunk + 9])
    bounds = torch.stack([begins, ends], 1)
    x = torch.full((int(ends[-1]) + 2, 70), torch.nan, dtype=torch.float64)
    scale = torch.logspace(-2, 2, 70, dtype=torch.float64)
    for begin, end in bounds.tolist():
        x[begin:end] = torch.randn(end - begin, 70, dtype=torch.float64) * scale
    x = x.to(dtype)
    sums, least = torch.zeros(70, dtype=torch.float64), torch.full((70,), torch.inf, dtype=torch.float64)
    greatest, alone = -least, torch.zeros_like(sums)
    for _ in range(2):
        column_norms_(sums, x, bounds=bounds, least=least, greatest=greatest)
        column_norms_(alone, x, bounds=bounds)
    want = reference.squares(x.double(), bounds)[(ends > begins)]
    for found, exact in (
        (sums, 2 * want.sum(0)), (alone, 2 * want.sum(0)), (least, want.amin(0)), (greatest, want.amax(0)),
    ):  # fmt: skip
        ones = torch.ones_like(exact)
        assert_catches_spoiled(
            lambda f, exact=exact, ones=ones: assert_agrees(
                "sums", f / exact, ones, ulps=64 if dtype == torch.float64 else 2.0**29
            ),
            found,
        )


def test_one_call_of_three_dimensions():
    x = torch.randn(2, 3, 5)
    sums = torch.zeros(5)
    column_norms_(sums, x, lengths=[3, 1])
    torch.testing.assert_close(sums, x[0].square().sum(0) + x[1, 0].square())
