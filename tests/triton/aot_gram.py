"""The GPU kernels of ``gram_``, compiled without a GPU."""

from __future__ import annotations

import aot
import pytest
import torch

from fastguard.ops.gram import triton as ops

TYPES = {
    "p_bounds": "*i64", "p_gram": "*fp32", "B": "i32", "width": "i32/16", "stride": "i32/16", "n_parts": "i32",
    "chunk": "i32",
}  # fmt: skip
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.mark.parametrize("arch", sorted(aot.SHARED_LIMIT))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [False, True], ids=["one part", "several"])
def test_products_do_not_spill(arch, dtype, parts):
    blocks = ops.config(DTYPES[dtype], 4096, aot.chip(arch))
    known = TYPES | {
        "p_x": f"*{dtype}", "p_part": "*fp32" if parts else None, "BLOCK": blocks.features, "BLOCK_K": blocks.rows,
        "PRECISION": "tf32x3" if dtype == "fp32" else "ieee",
    }  # fmt: skip
    arguments = {p.name: known[p.name] for p in ops.gram_kernel.params}
    out = aot.compile_kernel(ops.gram_kernel, arguments, arch, blocks.warps, blocks.stages)
    print(out)
    assert out.spills == 0 and out.shared <= aot.SHARED_LIMIT[arch]
    if (arch, dtype) == (90, "bf16"):  # products of 128 columns at a time, operands copied ahead 16 bytes at a time
        assert "HGMMA.64x128x16" in out.sass and "CALL" not in out.sass
        assert out.sass.count("LDGSTS.E.BYPASS.128") == out.sass.count("LDGSTS") > 0


@pytest.mark.parametrize("arch", sorted(aot.SHARED_LIMIT))
def test_joining_parts_does_not_spill(arch):
    known = TYPES | {"p_part": "*fp32", "BLOCK": 64}
    out = aot.compile_kernel(ops.join_kernel, {p.name: known[p.name] for p in ops.join_kernel.params}, arch, 4, 3)
    print(out)
    assert out.spills == 0 and out.shared <= aot.SHARED_LIMIT[arch]
