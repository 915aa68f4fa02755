"""The GPU kernels of ``representation_distance`` in Triton's interpreter, against the float64 specification.

Run by tests/test_triton.py with TRITON_INTERPRET=1 and FASTGUARD_BACKEND=triton in a process of its own. The
interpreter truncates where it stores bfloat16, which GPUs round: its gradients are held to one more ulp here.
"""

from __future__ import annotations

import os

import pytest
import torch

from checks import assert_agrees, assert_catches_spoiled
from fastguard.ops.representation_distance import reference, representation_distance

if os.environ.get("TRITON_INTERPRET") != "1" or os.environ.get("FASTGUARD_BACKEND") != "triton":
    pytest.skip("needs TRITON_INTERPRET=1 and FASTGUARD_BACKEND=triton", allow_module_level=True)

from fastguard.ops.representation_distance import triton as ops

pytestmark = pytest.mark.interpreter

KINDS = ["l2", "cosine"]

# (L, N, D) and why
SHAPES = {
    "one row": (2, 1, 40),
    "two features": (1, 5, 2),
    "rows that share a program, over the end of a layer": (3, 11, 576),
    "the widest row": (1, 2, ops.MAX_WIDTH),
    "wider than the widest": (1, 2, ops.MAX_WIDTH + 5),
}


def draw(shape, dtype, reference_dtype=None):
    a = (0.3 + torch.randn(shape, dtype=torch.float64)).to(dtype)
    b = (a.double() + torch.randn(shape, dtype=torch.float64)).to(reference_dtype or dtype)
    mask = torch.rand(shape[1]) < 0.7
    mask[0] = True
    mask[1:2] = False
    return a, b, mask


def upstream_of(shape):
    return torch.linspace(-1.5, 2.1, shape[0] * shape[1], dtype=torch.float64).view(shape[:2])


def value_and_gradient(fn, a, upstream):
    leaf = a.detach().clone().requires_grad_()
    value = fn(leaf)
    (grad,) = torch.autograd.grad(value, leaf, upstream.to(value.dtype))
    return value.detach(), grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtypes", [
    (torch.float32, torch.float32), (torch.float16, torch.float16), (torch.bfloat16, torch.float32),
    (torch.float32, torch.float64),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "whole"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_matches_reference(shape, masked, dtypes, kind):
    if dtypes != (torch.float32, torch.float32) and not (masked and shape[1] == 11):
        pytest.skip("dtypes change loads and stores only")
    a, b, mask = draw(shape, *dtypes)
    mask = mask if masked else None
    upstream = upstream_of(shape)
    value, grad = value_and_gradient(lambda v: representation_distance(v, b, mask, kind=kind), a, upstream)
    exact = value_and_gradient(lambda v: reference.representation_distance(v, b, mask, kind), a.double(), upstream)
    peer = value_and_gradient(lambda v: reference.representation_distance(v, b, mask, kind), a.float(), upstream)
    assert_agrees("distance", value, exact[0], peer[0])

    def check(g):
        assert_agrees("gradient", g, exact[1], peer[1].to(a.dtype), ulps=2 if a.dtype.itemsize == 2 else 32)

    if shape[1] > 1 and (shape[2] < 1000 or a.dtype == torch.float32):  # halves do not show one column of thousands
        rows = grad.flatten(0, 1)
        assert_catches_spoiled(lambda g: check(g.view(shape)), rows)
    check(grad)
    if masked:
        assert not value[:, ~mask].any() and not grad[:, ~mask].any()


@pytest.mark.parametrize("kind", KINDS)
def test_equal_rows_rows_of_zeros_and_what_is_masked(kind):
    a, b, mask = draw((2, 6, 70), torch.float32)
    value, grad = value_and_gradient(lambda v: representation_distance(v, a, kind=kind), a, upstream_of(a.shape))
    assert not value.any() and not grad.any()
    mask = torch.tensor([True, True, True, True, True, False])
    a[0, 1], b[0, 2] = 0, 0
    a[:, 5] = float("nan")
    b[1, 4, 3] = float("nan")
    value, grad = value_and_gradient(lambda v: representation_distance(v, b, mask, kind=kind), a, upstream_of(a.shape))
    assert not value[:, 5].any() and not grad[:, 5].any()
    assert value[1].isnan().tolist() == [False, False, False, False, True, False] and not value[0].isnan().any()
    if kind == "cosine":
        assert value[0, 1:3].tolist() == [1.0, 1.0] and not grad[0, 1:3].any()


@pytest.mark.parametrize("kind", KINDS)
def test_strides(kind):
    whole = torch.randn(4, 6, 48)
    a, b = whole[:2, 1:5], torch.randn(1, 1, 48).expand(2, 4, 48)
    upstream = upstream_of(a.shape)
    want = value_and_gradient(lambda v: representation_distance(v, b.contiguous(), kind=kind), a.contiguous(), upstream)
    leaf = whole.clone().requires_grad_()
    value = representation_distance(leaf[:2, 1:5], b, kind=kind)
    (grad,) = torch.autograd.grad(value, leaf, upstream.float())
    assert torch.equal(value.detach(), want[0]) and torch.equal(grad[:2, 1:5], want[1])
    assert int(grad.any(2).sum()) == 8
