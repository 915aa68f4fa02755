"""The GPU kernels of ``gram_`` in Triton's interpreter, against the float64 specification.

Run by tests/test_triton.py with TRITON_INTERPRET=1 and FASTGUARD_BACKEND=triton in a process of its own. bfloat16
is left to GPUs: the interpreter computes products of bfloat16 operands wrongly.
"""

from __future__ import annotations

import os

import pytest
import torch

from checks import assert_agrees, assert_catches_spoiled
from fastguard.ops.gram import gram_, reference
from fastguard.ops.table import Chip

if os.environ.get("TRITON_INTERPRET") != "1" or os.environ.get("FASTGUARD_BACKEND") != "triton":
    pytest.skip("needs TRITON_INTERPRET=1 and FASTGUARD_BACKEND=triton", allow_module_level=True)

from fastguard.ops.gram import triton as ops

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("parts", [1, 3], ids=["one part", "several"])
@pytest.mark.parametrize("width", [20, 150], ids=["one tile", "tiles on both sides of the diagonal"])
def test_matches_reference(width, parts, dtype, monkeypatch):
    """Samples of less than a block, of none, of several chunks; rows that are no one's hold NaN, as the upper half."""
    monkeypatch.setattr(ops, "CHUNK", 80)
    side = -(-width // ops.config(dtype, width, Chip("", "", 0)).features)
    monkeypatch.setattr(ops, "PROGRAMS", parts * side * (side + 1) // 2)
    bounds = torch.tensor([[0, 5], [7, 7], [9, 9 + 5 * 80 + 3], [420, 421]])
    x = torch.full((430, width), torch.nan, dtype=torch.float64)
    for begin, end in bounds.tolist():
        x[begin:end] = 0.5 + torch.randn(end - begin, width, dtype=torch.float64)
    x = x.to(dtype)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    gram = torch.full((width, width), torch.nan, dtype=state).triu(1)
    for _ in range(2):
        gram_(gram, x, bounds=bounds)
        assert torch.equal(gram, gram.mT)
    want = 2 * reference.gram(x.double(), bounds)
    assert_catches_spoiled(lambda g: assert_agrees("gram", g, want, ulps=64), gram)
