"""The GPU kernels of ``add_project_rms_norm``, compiled without a GPU for narrow, common and the widest rows."""

from __future__ import annotations

from typing import Any

import aot
import pytest

from fastguard.ops.add_project_rms_norm import triton as ops
from fastguard.ops.project_out import triton as projection

TYPES = {"p_index": "*i64", "N": "i32", "D": "i32/16", "K": "i32", "each": "i32", "scale": "fp32", "eps": "fp32"}
NARROW = (
    "p_x", "p_residual", "p_update", "p_weight", "p_stream", "p_out", "p_normed", "p_grad_stream", "p_grad_normed",
    "p_dh",
)  # fmt: skip


def compiled(kernel, arch: int, constants: dict[str, Any], absent: tuple[str, ...]):
    """A kernel on bf16 activations; the basis is fp32."""
    arguments: dict[str, Any] = {}
    for p in kernel.params:
        if p.is_constexpr:
            arguments[p.name] = constants[p.name]
        elif p.name.startswith("stride"):
            arguments[p.name] = "i32/16"
        elif p.name in absent:
            arguments[p.name] = None
        else:
            arguments[p.name] = "*bf16" if p.name in NARROW else TYPES.get(p.name, "*fp32")
    out = aot.compile_kernel(kernel, arguments, arch, constants.get("num_warps", 4), 3)
    print(constants, out)
    assert out.shared <= aot.SHARED_LIMIT[arch]
    return out


@pytest.mark.parametrize("width, arch", [(576, 90), (4096, 80), (4096, 90), (4096, 100), (ops.MAX_WIDTH, 90)])
def test_the_forward_does_not_spill(width, arch):
    flags = projection.row_tile(width) | {"HAS_BASIS": True, "HAS_INDEX": False, "NORM": 2 if width == 576 else 0}
    out = compiled(ops.norm_kernel, arch, flags, ("p_index", "p_bias"))
    assert out.spills == 0
    if (width, arch) == (4096, 90):  # residual and update are read once, stream and norm written once
        each = 4096 // (32 * flags["num_warps"]) // 8
        assert out.sass.count("STG.E.128") == 2 * each and "CALL" not in out.sass


@pytest.mark.parametrize("width", [576, 4096, ops.MAX_GRADIENT_WIDTH])
def test_the_gradient_does_not_spill(width):
    flags = projection.row_tile(width, per_warp=512) | {
        "HAS_BASIS": True, "HAS_INDEX": False, "NORM": 2 if width == 576 else 0, "NEED_WEIGHT": True,
    }  # fmt: skip
    assert compiled(ops.norm_gradient_kernel, 90, flags, ("p_index", "p_rows")).spills == 0


def test_many_directions_do_not_spill():
    flags = projection.TILE | {"DIRECTIONS": 64, "HAS_UPDATE": True, "NORM": 2}
    assert compiled(projection.project_tile_kernel, 90, flags, ()).spills == 0
