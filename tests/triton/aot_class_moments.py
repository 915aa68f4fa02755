"""The GPU kernel of ``class_moments_``, compiled without a GPU."""

from __future__ import annotations

import aot
import pytest

from fastguard.ops.class_moments import triton as ops


@pytest.mark.parametrize("arch", sorted(aot.SHARED_LIMIT))
def test_it_does_not_spill(arch):
    types = {"p_x": "*bf16", "p_count": "*i64", "p_label": "*i64", "p_positions": "*i64", "BLOCK": ops.BLOCK}
    arguments = {
        p.name: types.get(p.name, "*fp32" if p.name.startswith("p_") else "i32") for p in ops.moments_kernel.params
    }
    out = aot.compile_kernel(ops.moments_kernel, arguments, arch, 4, 3)
    print(out)
    assert out.spills == 0 and out.shared <= aot.SHARED_LIMIT[arch]
