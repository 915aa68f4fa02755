"""The GPU kernels of ``lm_head_stats``, compiled without a GPU at the shapes of Llama-3-8B's head in bf16."""

from __future__ import annotations

from typing import Any

import aot
import pytest
import torch

from fastguard.ops.lm_head_stats import triton as ops
from fastguard.ops.lm_head_stats.op import TILE

POINTERS = dict.fromkeys(("p_x", "p_weight", "p_dlogit"), "*bf16")
SIZES = dict.fromkeys(("N", "V", "D", "n_places", "stride_index", "stride_slot", "stride_tile"), "i32/16")
BYTES = dict.fromkeys(("p_columns", "p_peak", "p_codes"), "*u8")
INTEGERS = dict.fromkeys(
    ("p_index", "p_count", "p_column", "p_slot", "p_tile", "p_n_tiles", "p_least", "p_place", "p_key"), "*i32"
)
COUNTS = dict.fromkeys(("n_blocks", "n_parts", "n_columns", "n_tiles", "stride", "first", "code0", "code1"), "i32")
SCALARS = dict.fromkeys(("scale", "softcap", "log_v", "tau0", "tau1", "filter_tol"), "fp32")
TYPES = POINTERS | SIZES | BYTES | INTEGERS | COUNTS | SCALARS | {"p_target": "*i64"}

BLOCK_NAMES = {
    "scan_kernel": ("BLOCK_V", "BLOCK_K"),
    "dlogit_kernel": ("BLOCK_C", "BLOCK_K"),
    "dx_kernel": ("BLOCK_D", "BLOCK_C"),
    "dweight_kernel": ("BLOCK_D", "BLOCK_N"),
}
"""What a matrix kernel calls its outer and inner block."""

MATRIX = tuple(BLOCK_NAMES)


def arguments(name: str, blocks: ops.Blocks | None, plain: bool, dtype: str = "bf16") -> dict[str, Any]:
    """Types and constants of a kernel. plain: what a RepNoise step launches; otherwise every option on."""
    flags: dict[str, Any] = {
        "TILE": TILE, "COLUMNS": ops.COLUMNS, "PRECISION": "ieee", "EVEN": True, "HAS_BIAS": not plain,
        "HAS_CAP": not plain, "HAS_BOUND": True, "WITH_MEAN": not plain, "RECORD": True, "KEPT": True,
        "G_LSE": True, "G_REST": True, "G_TARGET": True, "G_MEAN": not plain, "ADD": not plain, "HAS_TAIL": True,
        "WEIGHT": True, "BIAS": not plain, "BLOCK": 2048, "BLOCK_D": 64, "BLOCK_N": 16, "BLOCK_K": 128,
    }  # fmt: skip
    if blocks is not None:
        outer, inner = BLOCK_NAMES[name]
        flags |= {outer: blocks.outer, inner: blocks.inner}
    absent = {"p_bias", "p_moment", "p_g_mean", "p_mean", "p_kept_mean", "p_dbias"} if plain else set()
    out: dict[str, Any] = {}
    for p in getattr(ops, name).params:
        if p.is_constexpr:
            out[p.name] = flags[p.name]
        elif p.name in absent:
            out[p.name] = None
        else:
            out[p.name] = TYPES.get(p.name, "*fp32").replace("bf16", dtype)
    return out


def compiled(name: str, arch: int, plain: bool = True) -> aot.Compiled:
    blocks = None
    if name in MATRIX:
        blocks = getattr(ops.config(torch.bfloat16, aot.SHARED_LIMIT[arch]), name.removesuffix("_kernel"))
    warps, stages = (blocks.warps, blocks.stages) if blocks else (4, 3)
    out = aot.compile_kernel(getattr(ops, name), arguments(name, blocks, plain), arch, warps, stages)
    print(out)
    return out


@pytest.mark.parametrize("arch", sorted(aot.SHARED_LIMIT))
@pytest.mark.parametrize("name", MATRIX)
def test_matrix_kernels_fit(name, arch):
    assert 0 < compiled(name, arch).shared <= aot.SHARED_LIMIT[arch]


@pytest.mark.parametrize("arch", sorted(aot.SHARED_LIMIT))
@pytest.mark.parametrize("name", MATRIX)
def test_matrix_kernels_with_every_option_fit(name, arch):
    assert compiled(name, arch, plain=False).shared <= aot.SHARED_LIMIT[arch]


@pytest.mark.parametrize("name", MATRIX)
def test_hopper_runs_on_its_tensor_cores_without_spills(name):
    kernel = compiled(name, 90)
    assert "HGMMA" in kernel.sass
    assert kernel.spills == 0


@pytest.mark.parametrize("arch", sorted(aot.SHARED_LIMIT))
@pytest.mark.parametrize(
    "name",
    ["target_kernel", "combine_kernel", "mark_kernel", "compact_kernel", "tail_kernel", "order_kernel"],
)
def test_the_other_kernels_compile(name, arch):
    kernel = compiled(name, arch, plain=False)
    assert kernel.shared <= aot.SHARED_LIMIT[arch]
    assert kernel.spills == 0


@pytest.mark.parametrize("name", MATRIX)
def test_float32_kernels_fit_everywhere(name):
    """Exact float32 products compile, and fit the smallest shared memory in use (AMD's 64 KiB)."""
    blocks = getattr(ops.config(torch.float32, 64 * 1024), name.removesuffix("_kernel"))
    arguments_ = arguments(name, blocks, plain=True, dtype="fp32")
    kernel = aot.compile_kernel(getattr(ops, name), arguments_, 80, blocks.warps, blocks.stages)
    print(kernel)
    assert kernel.shared <= 64 * 1024


@pytest.mark.parametrize("name", MATRIX)
def test_half_precision_kernels_fit_small_devices(name):
    """Consumer GPUs (99 KiB) take the narrow blocks."""
    blocks = getattr(ops.config(torch.bfloat16, 99 * 1024), name.removesuffix("_kernel"))
    kernel = aot.compile_kernel(getattr(ops, name), arguments(name, blocks, True), 89, blocks.warps, blocks.stages)
    print(kernel)
    assert kernel.shared <= 64 * 1024
