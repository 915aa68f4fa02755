"""The GPU kernels of ``project_out`` in Triton's interpreter, against the float64 specification.

Run by tests/test_triton.py with TRITON_INTERPRET=1 and FASTGUARD_BACKEND=triton in a process of its own. The
interpreter truncates where it stores bfloat16, which GPUs round: those results are held to one more ulp here.
"""

from __future__ import annotations

import os

import pytest
import torch

from checks import assert_agrees, assert_catches_spoiled
from fastguard import directions
from fastguard.ops.project_out import project_out, project_out_, reference

if os.environ.get("TRITON_INTERPRET") != "1" or os.environ.get("FASTGUARD_BACKEND") != "triton":
    pytest.skip("needs TRITON_INTERPRET=1 and FASTGUARD_BACKEND=triton", allow_module_level=True)

from fastguard.ops.project_out import triton as ops

pytestmark = pytest.mark.interpreter

# (shape of x, K, index's dimensions or None) and why
SHAPES = {
    "one row, one direction": ((1, 40), 1, None),
    "rows that share a program": ((11, 576), 4, None),
    "many directions": ((19, 150), 17, None),
    "a basis for each sequence": ((4, 3, 50), 3, 1),
    "too wide for registers": ((3, 150), 1, None),
}


def draw(case, dtype):
    shape, k, index_dims = case
    x = (0.3 + torch.randn(shape, dtype=torch.float64)).to(dtype)
    basis = directions.orthonormalise(torch.randn(*(() if index_dims is None else (3,)), k, shape[-1]))
    index = None if index_dims is None else torch.randint(-1, 3, shape[:index_dims])
    if index is not None:
        index.view(-1)[0] = -1
    return x, basis, index


@pytest.mark.parametrize("preserve", [False, True], ids=["linear", "norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES.keys())
def test_matches_reference(case, dtype, preserve, monkeypatch):
    if case == SHAPES["too wide for registers"]:
        monkeypatch.setattr(ops, "MAX_WIDTH", 128)
        monkeypatch.setattr(ops, "MAX_GRADIENT_WIDTH", 128)
    if dtype == torch.float16 and case[1] != 4:
        pytest.skip("a third dtype is another store, not another kernel")
    x, basis, index = draw(case, dtype)
    upstream = torch.randn(x.shape, dtype=torch.float64).to(dtype)
    leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    value = project_out(leaf, basis, 1.2, basis_index=index, preserve_norm=preserve)
    (grad,) = torch.autograd.grad(value, leaf, upstream)
    want = reference.project_out(exact, basis.double(), 1.2, index, preserve)
    (want_grad,) = torch.autograd.grad(want, exact, upstream.double())
    ulps = {torch.float32: 32.0, torch.float16: 1.0, torch.bfloat16: 2.0}[dtype]
    assert_agrees("value", value.detach(), want.detach(), ulps=ulps)
    assert_catches_spoiled(
        lambda g: assert_agrees("gradient", g.view(x.shape), want_grad, ulps=ulps), grad.flatten(0, -2)
    )
    if index is not None:
        assert torch.equal(value[index < 0], x[index < 0])
    project_out_(x, basis, 1.2, basis_index=index, preserve_norm=preserve)
    assert torch.equal(x, value)


def test_nothing_left_strides_and_float64():
    x = torch.randn(3, 8, 20)
    basis = torch.eye(20)[:2]
    x[0, 0, 2:] = 0
    leaf = x.clone().requires_grad_()
    out = project_out(leaf[:, 1:5], basis, preserve_norm=True)
    assert torch.equal(out, project_out(x[:, 1:5].contiguous(), basis, preserve_norm=True))
    out = project_out(leaf, basis, preserve_norm=True)
    (grad,) = torch.autograd.grad(out, leaf, torch.randn(x.shape))
    assert not out[0, 0].any() and not grad[0, 0].any() and grad[0, 1].any()
    every_other = x.double()[..., ::2]
    narrow = torch.eye(10)[:2]
    assert_agrees("float64", project_out(every_other, narrow), reference.project_out(every_other, narrow))
