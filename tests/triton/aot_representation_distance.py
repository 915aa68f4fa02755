"""The GPU kernels of ``representation_distance``, compiled without a GPU for narrow, common and the widest rows."""

from __future__ import annotations

import functools
from typing import Any

import aot
import pytest

import triton
from fastguard.ops.representation_distance import triton as ops

KERNELS = ("distance_kernel", "gradient_kernel")
WIDTHS = (576, 4096, ops.MAX_WIDTH)
STRIDES = dict.fromkeys(("stride_al", "stride_an", "stride_bl", "stride_bn"), "i32/16")
TYPES = {"p_mask": "*u8", "n_rows": "i32", "N": "i32", "D": "i32/16"} | STRIDES


@functools.cache
def compiled(name: str, arch: int, width: int, cosine: bool, dtype: str = "*bf16", masked: bool = False):
    block = triton.next_power_of_2(width)
    rows = max(1, ops.ELEMENTS // block)
    constants = {"ROWS": rows, "BLOCK": block, "COSINE": cosine, "HAS_MASK": masked}
    types = TYPES | {"p_a": dtype, "p_b": dtype, "p_da": dtype}
    arguments: dict[str, Any] = {}
    for p in getattr(ops, name).params:
        if p.is_constexpr:
            arguments[p.name] = constants[p.name]
        else:
            arguments[p.name] = None if p.name == "p_mask" and not masked else types.get(p.name, "*fp32")
    out = aot.compile_kernel(getattr(ops, name), arguments, arch, ops.warps(rows * block), 3)
    assert out.shared <= aot.SHARED_LIMIT[arch]
    return out


@pytest.mark.parametrize(("arch", "width"), [(90, w) for w in WIDTHS] + [(80, ops.MAX_WIDTH), (100, ops.MAX_WIDTH)])
@pytest.mark.parametrize("cosine", [False, True], ids=["l2", "cosine"])
@pytest.mark.parametrize("name", KERNELS)
def test_no_width_spills(name, width, cosine, arch):
    assert compiled(name, arch, width, cosine).spills == 0


@pytest.mark.parametrize("dtype", ["*fp32", "*fp16"])
@pytest.mark.parametrize("name", KERNELS)
def test_other_launches_do_not_spill_on_hopper(name, dtype):
    assert compiled(name, 90, ops.MAX_WIDTH, True, dtype, True).spills == 0


def test_what_the_kernels_are_made_of():
    """Rows are read and gradients written eight bf16 at a time; a cosine's rows are read once."""
    distance, gradient = (compiled(name, 90, 4096, True).sass for name in KERNELS)
    assert "LDG.E.128" in distance and "STG.E.128" in gradient
    elements = 4096 // (32 * ops.warps(4096))
    assert distance.count("LDG.E.128") == gradient.count("LDG.E.128") == 2 * elements // 8
    assert "CALL" not in distance + gradient
