"""The GPU kernels of ``threshold_select`` in Triton's interpreter, against a stable sort of everything.

Run by tests/test_triton.py with TRITON_INTERPRET=1 and FASTGUARD_BACKEND=triton in a process of its own.
"""

from __future__ import annotations

import itertools
import os

import pytest
import torch

from fastguard.ops.threshold_select import reference, threshold_select

if os.environ.get("TRITON_INTERPRET") != "1" or os.environ.get("FASTGUARD_BACKEND") != "triton":
    pytest.skip("needs TRITON_INTERPRET=1 and FASTGUARD_BACKEND=triton", allow_module_level=True)

pytestmark = pytest.mark.interpreter

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
PER = ["model", "tensor", "row"]

# Shapes and why: no dimension; none; rows that share bytes of the mask; rows of two blocks
SHAPES = [(), (0,), (3, 0), (5, 33), (2, 2050)]


def draw(kind, dtypes, shapes=SHAPES):
    dtype = itertools.cycle(dtypes)
    made = {
        "normal": torch.randn,
        "ties": lambda shape: torch.randint(-2, 3, shape) * torch.randint(-1, 2, shape).double(),
        "denormal": lambda shape: torch.randn(shape, dtype=torch.float64) * 1e-39,
        "infinite": lambda shape: torch.randn(shape).exp().div(0.9).frac().div(torch.randint(0, 2, shape)),
    }[kind]
    return [torch.nan_to_num(made(s), nan=-1.0, posinf=float("inf")).to(next(dtype)) for s in shapes]


def assert_selected(scores, weights, k, per):
    sizes = {
        "model": [sum(s.numel() for s in scores)],
        "tensor": [s.numel() for s in scores],
        "row": [s.shape[-1] if s.dim() else 1 for s in scores],
    }[per]
    counts = [int(k * n) if isinstance(k, float) else min(k, n) for n in sizes]
    masks, thresholds = reference.select(scores, weights, counts, per)
    selected = threshold_select(scores, k, weights=weights, per=per)
    for i, mask in enumerate(masks):
        assert torch.equal(selected.unpacked(i), mask), f"masks[{i}]"
        if per == "row":
            assert torch.equal(selected.threshold[i].double(), thresholds[i])
    if per != "row":
        assert torch.equal(selected.threshold.double().flatten(), torch.stack(thresholds))
    assert selected.count == sum(int(m.sum()) for m in masks)


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize(
    ("kind", "dtypes"),
    [
        *itertools.product(("normal", "ties", "denormal", "infinite"), ([torch.float32], DTYPES)),
        *itertools.product(("normal",), ([d] for d in DTYPES[1:])),  # the interpreter is slow
    ],
    ids=str,
)
def test_scores(dtypes, kind, per):
    scores = draw(kind, dtypes)
    for k in (0, 0.3):
        assert_selected(scores, None, k, per)


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize(
    "dtypes",
    [
        ([torch.float32], [torch.float32]),
        ([torch.bfloat16], [torch.bfloat16]),
        (DTYPES[:3], DTYPES[1:3]),
        (DTYPES, DTYPES[1:]),
    ],
    ids=str,
)
def test_scores_of_weights(dtypes, per):
    assert_selected(draw("normal", dtypes[0]), draw("normal", dtypes[1]), 0.2, per)
    assert_selected(draw("ties", dtypes[0]), draw("ties", dtypes[1]), 0.2, per)


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_is_refused_by_name(dtype, per):
    good, bad = torch.tensor([1.0, float("inf"), -float("inf")]).to(dtype), torch.zeros(2500, dtype=dtype)
    bad[2400] = float("nan")
    with pytest.raises(ValueError, match=r"scores\[1\]: expected numbers that can be ordered, got NaN"):
        threshold_select([good, bad], 2, per=per)


def test_ties_over_tensors_and_spans():
    """What is chosen ends in the second span of the second tensor."""
    scores = draw("ties", [torch.bfloat16], [(1000,), (65536 + 2000,), (50,)])
    n = sum(int((s > 0).sum()) for s in scores) + sum(int((s[:66000] == 0).sum()) for s in scores[:2])
    assert_selected(scores, None, n, "model")
    assert threshold_select(scores, n).threshold == 0
