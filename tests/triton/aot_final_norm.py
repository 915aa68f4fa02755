"""The GPU kernels of ``final_norm``, compiled without a GPU: the forward, and the gradient with rows picked."""

from __future__ import annotations

from typing import Any

import aot
import pytest

from fastguard.ops.add_project_rms_norm.triton import norm_gradient_kernel
from fastguard.ops.final_norm import triton as ops
from fastguard.ops.project_out.triton import row_tile

TYPES = {"p_rows": "*i64", "N": "i32", "D": "i32/16", "K": "i32", "each": "i32", "scale": "fp32", "eps": "fp32"}
WIDE = ("p_grad_normed", "p_partial")


def compiled(kernel, arch: int, flags: dict[str, Any], *absent: str):
    arguments = {
        p.name: flags[p.name] if p.is_constexpr
        else None if p.name in absent
        else "i32/16" if p.name.startswith("stride")
        else TYPES.get(p.name, "*fp32" if p.name in WIDE else "*bf16")
        for p in kernel.params
    }  # fmt: skip
    out = aot.compile_kernel(kernel, arguments, arch, flags["num_warps"], 3)
    print(flags, out)
    assert out.spills == 0
    return out


@pytest.mark.parametrize("arch", sorted(aot.SHARED_LIMIT))
@pytest.mark.parametrize("width, kind", [(4096, 0), (8192, 0), (576, 1), (ops.MAX_WIDTH, 2)])
def test_the_forward_does_not_spill(width, kind, arch):
    absent = () if kind == 2 else ("p_bias",)
    out = compiled(ops.gather_norm_kernel, arch, row_tile(width) | {"NORM": kind}, *absent)
    if (width, arch) == (4096, 90):  # each feature is read once and written once, 16 bytes at a time
        each = 4096 // (32 * row_tile(width)["num_warps"]) // 8
        assert out.sass.count("STG.E.128") == each and "CALL" not in out.sass
        assert out.sass.count("LDG.E.128") == 2 * each  # the row and the weight


@pytest.mark.parametrize("width, kind", [(576, 1), (4096, 0), (ops.MAX_GRADIENT_WIDTH, 0)])
def test_the_gradient_of_picked_rows_does_not_spill(width, kind):
    flags = row_tile(width, per_warp=512) | {"HAS_BASIS": False, "HAS_INDEX": False, "NORM": kind, "NEED_WEIGHT": True}
    compiled(norm_gradient_kernel, 90, flags, "p_basis", "p_index", "p_grad_stream")
