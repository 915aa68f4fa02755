"""The GPU kernels of packed masks in Triton's interpreter, bit for bit as the specification has it.

Run by tests/test_triton.py with TRITON_INTERPRET=1 and FASTGUARD_BACKEND=triton in a process of its own.
"""

from __future__ import annotations

import os

import pytest
import torch

from fastguard.ops.masks import apply_mask_, count_bits, pack_mask, reference, unpack_mask

if os.environ.get("TRITON_INTERPRET") != "1" or os.environ.get("FASTGUARD_BACKEND") != "triton":
    pytest.skip("needs TRITON_INTERPRET=1 and FASTGUARD_BACKEND=triton", allow_module_level=True)

pytestmark = pytest.mark.interpreter

INTEGERS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16}


@pytest.mark.parametrize("n", [0, 1, 9, 4095, 4096, 9001])  # none; a bit; a byte and a bit; around a program; several
def test_masks(n):
    mask = torch.rand(n) < 0.4
    packed = pack_mask(mask)
    assert torch.equal(packed, reference.pack(mask))
    assert torch.equal(unpack_mask(packed, (n,)), mask)
    assert int(count_bits(packed)) == int(mask.sum())
    for dtype, integer in INTEGERS.items():
        memory, value = torch.randint(0, 256, (2, (n + 2) * dtype.itemsize), dtype=torch.uint8).view(dtype)
        for given in (None, value[1:-1]):
            whole, exact = memory.clone(), memory.clone().view(integer)
            apply_mask_(whole[1:-1], packed, given)
            exact[1:-1] = reference.apply(exact[1:-1], mask, None if given is None else given.view(integer))
            assert torch.equal(whole.view(integer), exact)
