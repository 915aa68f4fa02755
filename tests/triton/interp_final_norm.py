"""The GPU kernels of ``final_norm`` in Triton's interpreter, against the float64 specification."""

from __future__ import annotations

import os

import pytest
import torch

from checks import assert_agrees, assert_catches_spoiled
from fastguard.ops.lens_stats import reference
from fastguard.ops.vocabulary import Norm

if os.environ.get("TRITON_INTERPRET") != "1" or os.environ.get("FASTGUARD_BACKEND") != "triton":
    pytest.skip("needs TRITON_INTERPRET=1 and FASTGUARD_BACKEND=triton", allow_module_level=True)

from fastguard.ops.final_norm import portable
from fastguard.ops.final_norm import triton as ops

pytestmark = pytest.mark.interpreter

# (width, kind, whether there is a weight, a bias, whether rows are picked) and why
CASES = {
    "Llama's": (576, "rms", True, False, True),
    "Gemma's": (40, "rms_offset", True, False, True),
    "a layer norm, odd width": (77, "layer", True, True, True),
    "without a weight, all rows": (48, "rms", False, False, False),
    "a layer norm with nothing": (48, "layer", False, False, False),
}


def drawn(case, dtype):
    width, kind, weighted, biased, picked = case
    source = torch.randn(23, 2 * width, dtype=torch.float64).to(dtype)[:, :width]  # rows need not lie side by side
    rows = torch.randperm(23)[:9] if picked else None
    weight = torch.rand(width).add(0.3).to(dtype) if weighted else None
    bias = torch.randn(width).to(dtype) if biased else None
    return source, rows, Norm(kind, weight, bias, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_matches_reference(case, dtype):
    source, rows, norm = drawn(case, dtype)
    n = source.shape[0] if rows is None else rows.shape[0]
    grad = torch.randn(n, source.shape[1])

    leaves = [t.double().requires_grad_() for t in (source, norm.weight, norm.bias) if t is not None]
    w, b = (*leaves[1:], None, None)[:2]
    exact = reference.final_norm(leaves[0] if rows is None else leaves[0][rows], Norm(norm.kind, w, b, norm.eps))
    want = torch.autograd.grad(exact, leaves, grad.double())

    out = ops.forward(source, rows, norm, dtype)
    assert_agrees("normed", out, exact.detach(), portable.forward(source, rows, norm, dtype), ulps=8.0)
    found, peers = ([g for g in m.backward(grad, source, rows, norm) if g is not None] for m in (ops, portable))
    assert len(found) == len(want) and found[0].dtype == dtype
    for i, (got, right, peer) in enumerate(zip(found, want, peers, strict=True)):

        def check(g, right=right, peer=peer, i=i):
            assert_agrees(f"gradient {i}", g, right, peer, ulps=8.0)

        check(got)
        assert_catches_spoiled(check, got)


def test_rounds_for_the_product_after_the_norm():
    """float32 rows and a bf16 head: one rounding; bf16 rows and an fp32 head: as the model's norm rounds."""
    for own, product in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        source, rows, norm = drawn(CASES["Llama's"], own)
        out, want = (m.forward(source, rows, norm, product) for m in (ops, portable))
        assert out.dtype == want.dtype == product
        torch.testing.assert_close(out.float(), want.float(), rtol=2**-6, atol=0)  # the interpreter truncates, twice


def test_no_rows_and_a_row_too_wide_for_registers(monkeypatch):
    source, _, norm = drawn(CASES["Llama's"], torch.float32)
    none = torch.zeros(0, dtype=torch.int64)
    assert ops.forward(source, none, norm, torch.float32).shape == (0, 576)
    assert not ops.backward(torch.zeros(0, 576), source, none, norm)[0].any()
    monkeypatch.setattr(ops, "MAX_WIDTH", 512)
    monkeypatch.setattr(ops, "MAX_GRADIENT_WIDTH", 512)
    grad = torch.randn(23, 576)
    assert torch.equal(
        ops.forward(source, None, norm, torch.float32), portable.forward(source, None, norm, torch.float32)
    )
    assert torch.equal(ops.backward(grad, source, None, norm)[0], portable.backward(grad, source, None, norm)[0])
