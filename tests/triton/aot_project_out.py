"""The GPU kernels of ``project_out``, compiled without a GPU for narrow, common and the widest rows."""

from __future__ import annotations

from typing import Any

import aot
import pytest

from fastguard.ops.project_out import triton as ops

TYPES = {"p_index": "*i64", "N": "i32", "D": "i32/16", "K": "i32", "each": "i32", "scale": "fp32", "eps": "fp32"}
STRIDES = dict.fromkeys(("stride_x", "stride_update", "stride_out", "stride_grad", "stride_dx"), "i32/16")


def compiled(kernel, arch: int, constants: dict[str, Any], dtype: str = "*bf16", absent: tuple[str, ...] = ()):
    """A kernel on activations of a dtype; the basis is fp32."""
    rows = dict.fromkeys(("p_x", "p_out", "p_grad", "p_dx", "p_update", "p_normed", "p_weight"), dtype)
    types = TYPES | STRIDES | rows
    arguments: dict[str, Any] = {}
    for p in kernel.params:
        if p.is_constexpr:
            arguments[p.name] = constants[p.name]
        else:
            arguments[p.name] = None if p.name in absent else types.get(p.name, "*fp32")
    out = aot.compile_kernel(kernel, arguments, arch, constants.get("num_warps", 4), 3)
    print(constants, dtype, out)
    assert out.shared <= aot.SHARED_LIMIT[arch]
    return out


@pytest.mark.parametrize("width", [576, 4096, ops.MAX_WIDTH])
def test_the_forward_does_not_spill(width):
    for arch in aot.SHARED_LIMIT if width == 4096 else (90,):
        flags = ops.row_tile(width) | {"HAS_INDEX": False, "PRESERVE": width != 4096}
        out = compiled(ops.project_kernel, arch, flags, absent=("p_index",))
        assert out.spills == 0
        if (width, arch) == (4096, 90):  # a row is read once, and read and written eight bf16 at a time
            each = 4096 // (32 * flags["num_warps"]) // 8
            assert out.sass.count("STG.E.128") == each and "CALL" not in out.sass


@pytest.mark.parametrize("width", [576, ops.MAX_GRADIENT_WIDTH])
def test_the_gradient_does_not_spill(width):
    flags = ops.row_tile(width) | {"HAS_INDEX": True}
    assert compiled(ops.project_gradient_kernel, 90, flags, "*fp32").spills == 0


def test_matrix_products_do_not_spill():
    flags = ops.TILE | {"DIRECTIONS": 64, "HAS_UPDATE": False, "NORM": None}
    absent = ("p_update", "p_weight", "p_bias", "p_normed")
    assert compiled(ops.project_tile_kernel, 90, flags, absent=absent).spills == 0
