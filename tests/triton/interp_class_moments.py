"""The GPU kernel of ``class_moments_`` in Triton's interpreter, against the float64 specification.

Run by tests/test_triton.py with TRITON_INTERPRET=1 and FASTGUARD_BACKEND=triton in a process of its own.
"""

from __future__ import annotations

import os

import pytest
import torch

from checks import assert_agrees, assert_catches_spoiled
from fastguard.ops.class_moments import class_moments_, reference

if os.environ.get("TRITON_INTERPRET") != "1" or os.environ.get("FASTGUARD_BACKEND") != "triton":
    pytest.skip("needs TRITON_INTERPRET=1 and FASTGUARD_BACKEND=triton", allow_module_level=True)

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("own", [False, True], ids=["the same positions", "positions of its own"])
def test_matches_reference(own, dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    count, mean, second = torch.zeros(3, dtype=torch.long), *torch.zeros(2, 3, 2, 300, dtype=wide)
    rests = [torch.zeros_like(mean) if wide == torch.float32 else None for _ in range(2)]
    xs, labels, places = [], [], []
    for size, allowed in ((5, [-1, 0, 1, 2]), (4, [0, 2]), (1, [-1])):
        x = (100 + torch.randn(size, 6, 300, dtype=torch.float64)).to(dtype)
        label = torch.tensor(allowed)[torch.randint(len(allowed), (size,))]
        at = torch.randint(-6, 6, (size, 2)) if own else torch.tensor([-5, 3]).expand(size, 2)
        positions = at if own else (-5, 3)
        class_moments_(count, mean, rests[0], x, label, positions=positions, second=second, second_rest=rests[1])
        xs.append(x.double())
        labels.append(label)
        places.append(at)
    want = reference.moments(torch.cat(xs), torch.cat(labels), 3, torch.cat(places))
    assert torch.equal(count, want[0]) and mean.any()
    ulps = 2.0**10 if wide == torch.float64 else 2.0**12  # in ulps of float64: pairs of fp32 have 48 bits
    for got, rest, exact in zip((mean, second), rests, want[1:], strict=True):
        found = got.double() if rest is None else got.double() + rest.double()
        assert_catches_spoiled(
            lambda g, exact=exact: assert_agrees("moment", g.view(exact.shape), exact, ulps=ulps), found.view(6, 300)
        )
