"""The GPU kernels of ``add_project_rms_norm`` in Triton's interpreter, against the float64 specification.

Run by tests/test_triton.py with TRITON_INTERPRET=1 and FASTGUARD_BACKEND=triton in a process of its own. The
interpreter truncates where it stores bfloat16, which GPUs round: those results are held to more ulps here.
"""

from __future__ import annotations

import os

import pytest
import torch

from checks import assert_agrees, assert_catches_spoiled
from fastguard import directions
from fastguard.ops.add_project_rms_norm import add_project_rms_norm, reference

if os.environ.get("TRITON_INTERPRET") != "1" or os.environ.get("FASTGUARD_BACKEND") != "triton":
    pytest.skip("needs TRITON_INTERPRET=1 and FASTGUARD_BACKEND=triton", allow_module_level=True)

from fastguard.ops.add_project_rms_norm import triton as ops
from fastguard.ops.project_out import triton as projection

pytestmark = pytest.mark.interpreter

# (shape, K, index's dimensions, kind, whether there are weight and bias) and why
CASES = {
    "a plain norm, programs with several rows": ((37, 576), None, None, "rms", True),
    "one direction": ((3, 40), 1, None, "rms", True),
    "layer norm, no weight": ((9, 100), 4, None, "layer", False),
    "many directions": ((19, 150), 17, None, "rms_offset", True),
    "many directions, layer norm": ((5, 70), 16, None, "layer", True),
    "a basis for each sequence": ((4, 3, 50), 3, 1, "rms_offset", True),
    "too wide for registers": ((3, 150), 1, None, "rms", True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_matches_reference(case, dtype, monkeypatch):
    shape, k, index_dims, kind, weighted = case
    if case == CASES["too wide for registers"]:
        for module in (ops, projection):
            monkeypatch.setattr(module, "MAX_WIDTH", 128)
            monkeypatch.setattr(module, "MAX_GRADIENT_WIDTH", 128)
    residual, update = (torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(2))
    given = [residual, update, *(torch.rand(2, shape[-1]).add(0.3).to(dtype) if weighted else ())]
    groups = () if index_dims is None else (3,)
    basis = None if k is None else directions.orthonormalise(torch.randn(*groups, k, shape[-1]))
    index = None if index_dims is None else torch.tensor([1, -1, 2, 0])
    upstream = [torch.randn(shape, dtype=torch.float64) for _ in range(2)]

    def run(op, wide):
        leaves = [t.detach().to(wide).requires_grad_() for t in given]
        weight, bias = leaves[2:] if weighted else (None, None)
        q = basis if basis is None or wide != torch.float64 else basis.double()
        out = op(*leaves[:2], q, weight, 1e-5, scale=0.9, kind=kind, bias=bias, basis_index=index)
        return [*out, *torch.autograd.grad(out, leaves, [u.to(dtype).to(wide) for u in upstream])]

    found, want = run(add_project_rms_norm, dtype), run(reference.add_project_rms_norm, torch.float64)
    ulps = 32.0 if dtype == torch.float32 else 8.0
    for i, (got, exact) in enumerate(zip(found, want, strict=True)):

        def check(g, exact=exact, i=i):
            assert_agrees(str(i), g.reshape(exact.shape), exact.detach(), ulps=ulps)

        check(got.detach())
        if i >= 2:
            assert_catches_spoiled(check, got.flatten(0, -2) if got.dim() > 2 else got)


def test_either_gradient_alone_and_strides():
    whole = torch.randn(4, 6, 48)
    r, u, w = whole[:, 1:4], torch.randn(1, 1, 48).expand(4, 3, 48), torch.rand(48)
    basis = directions.orthonormalise(torch.randn(2, 48))
    leaf, exact = r.detach().requires_grad_(), r.double().requires_grad_()
    got = add_project_rms_norm(leaf, u, basis, w, 1e-5)
    want = reference.add_project_rms_norm(exact, u, basis.double(), w, 1e-5)
    for one, other in zip(got, want, strict=True):
        upstream = torch.randn(one.shape)
        grads = [
            torch.autograd.grad(y, x, upstream.to(y.dtype), retain_graph=True)[0]
            for y, x in ((one, leaf), (other, exact))
        ]
        assert_agrees("gradient", *grads)
    plain, _ = add_project_rms_norm(leaf, u, None, w, 1e-5)
    assert torch.equal(torch.autograd.grad(plain.sum(), leaf)[0], torch.ones_like(leaf))
