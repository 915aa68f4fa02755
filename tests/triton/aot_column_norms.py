"""The GPU kernel of ``column_norms_``, compiled without a GPU."""

from __future__ import annotations

import aot
import pytest
import triton.language as tl

from fastguard.ops.column_norms import triton as ops


@pytest.mark.parametrize("arch", sorted(aot.SHARED_LIMIT))
@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp64"])
def test_it_does_not_spill(arch, dtype):
    types = {
        "p_x": f"*{dtype}", "p_bounds": "*i64", "p_out": "*fp64", "n_blocks": "i32", "n_parts": "i32",
        "width": "i32/16", "stride": "i32/16",
        "ROWS": ops.ROWS, "BLOCK": ops.BLOCK, "STEPS": ops.STEPS,
        "WIDE": tl.float64 if dtype == "fp64" else tl.float32,
    }  # fmt: skip
    out = aot.compile_kernel(ops.squares_kernel, {p.name: types[p.name] for p in ops.squares_kernel.params}, arch, 4, 3)
    print(out)
    assert out.spills == 0 and out.shared <= aot.SHARED_LIMIT[arch]
    if (arch, dtype) == (90, "bf16"):  # a tile of 32 x 64 by 128 threads: two loads of eight bf16 each
        assert out.sass.count("LDG.E.128") == 2 and "LDG.E.U16" not in out.sass and "CALL" not in out.sass
