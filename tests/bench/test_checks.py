"""The float64 check of every op, on a CPU's own backends: what agrees passes, and what does not is named."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from checks import spoiled
from fastguard import backend
from fastguard.bench.checks import CHECKS, Case, check
from fastguard.doctor import OPS


def case(dtype=torch.float32):
    return Case("cpu", dtype, rows=6, width=16, vocabulary=40, seed=3)


def test_every_op_has_a_check():
    assert CHECKS.keys() == OPS.keys()


@pytest.mark.parametrize("op", CHECKS)
def test_an_op_agrees_and_each_of_its_results_is_refused_when_spoiled(op):
    for result in CHECKS[op](case()):
        assert result.wrong() is None, f"{result.name}: {result.wrong()}"
        for kind, wrong in spoiled(result.actual).items():
            if not torch.equal(wrong, result.actual):  # a column off is none where columns are alike
                assert result._replace(actual=wrong).wrong(), f"{result.name}: {kind}"
        unwritten = torch.full_like(result.actual, torch.nan)
        assert "not finite" in str(result._replace(actual=unwritten).wrong())


def test_a_kernel_that_does_nothing_is_named_with_its_dtype(monkeypatch):
    own = backend.choose
    idle = SimpleNamespace(add=lambda gram, x, bounds: None)
    monkeypatch.setattr(backend, "choose", lambda op, device: idle if op == "gram" else own(op, device))
    assert str(check("gram", case(torch.bfloat16))).startswith("gram, bfloat16: max error")
    assert check("masks", case()) is None


def test_a_seed_draws_the_same_data():
    a, b = (next(CHECKS["gram"](case())) for _ in range(2))
    assert torch.equal(a.exact, b.exact)
