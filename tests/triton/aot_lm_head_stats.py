"""The GPU kernels of ``lm_head_stats``, compiled without a GPU at the shapes of Llama-3-8B's head in bf16."""

from __future__ import annotations

import functools
from typing import Any

import aot
import pytest
import torch

import triton
from fastguard.ops.lm_head_stats.op import TILE, Grads, Saved
from fastguard.ops.lm_head_stats.triton import (
    combine,
    configs,
    dlogit,
    dweight,
    dx,
    gradient,
    lists,
    scan,
    tail,
    target,
    warm,
)

KERNELS = {
    name: kernel
    for module in (combine, dlogit, dweight, dx, gradient, lists, scan, tail, target, warm)
    for name, kernel in vars(module).items()
    if name.endswith("_kernel")
}

POINTERS = dict.fromkeys(("p_x", "p_weight", "p_dlogit", "p_bias", "p_tail_row"), "*bf16")
SIZES = dict.fromkeys(
    ("N", "V", "D", "n_places", "stride_columns", "stride_index", "stride_z", "stride_out", "first"), "i32/16"
)
BYTES = dict.fromkeys(("p_columns", "p_codes"), "*u8")
INTEGERS = dict.fromkeys(
    ("p_index", "p_count", "p_column", "p_place", "p_most", "p_tile", "p_n_tiles", "p_least", "p_key", "p_floor"),
    "*i32",
)
COUNTS = dict.fromkeys(("n_blocks", "n_parts", "n_tiles", "n_kept", "stride", "top"), "i32")
SCALARS = dict.fromkeys(("scale", "softcap", "log_v", "filter_tol", "coverage"), "fp32")
TUPLES = {
    "p_grads": Grads(*["*fp32"] * 4), "p_saved": Saved(*["*fp32"] * 3), "p_parts": scan.Parts(*["*fp32"] * 4),
}  # fmt: skip
TYPES = POINTERS | SIZES | BYTES | INTEGERS | COUNTS | SCALARS | TUPLES | {"p_target": "*i64"}
ODD = {
    "add_rows_kernel": {"p_index": "*i64"}, "gradient_kernel": {"p_out": "*bf16", "BLOCK_V": 512},
    "dweight_kernel": {"p_shrink": None}, "dx_kernel": {"p_shrink": None},
}  # fmt: skip
"""Where a name means something else; and what only float16 has."""

PLAIN = {
    **dict.fromkeys(("p_bias", "softcap", "p_mean", "p_kept_mean", "p_dbias")),
    "p_grads": TUPLES["p_grads"]._replace(mean_logit=None), "p_saved": TUPLES["p_saved"]._replace(mean_logit=None),
    "p_parts": TUPLES["p_parts"]._replace(moment=None),
}  # fmt: skip
"""What a RepNoise step leaves out."""

BLOCK_NAMES = {
    "scan_kernel": ("BLOCK_V", "BLOCK_K"),
    "dlogit_kernel": ("BLOCK_C", "BLOCK_K"),
    "dx_kernel": ("BLOCK_D", "BLOCK_C"),
    "dweight_kernel": ("BLOCK_D", "BLOCK_N"),
}
"""What a matrix kernel calls its outer and inner block."""

MATRIX = tuple(BLOCK_NAMES)


def arguments(name: str, blocks: configs.Blocks | None, plain: bool, dtype: str = "bf16") -> dict[str, Any]:
    """Types and constants of a kernel. plain: what a RepNoise step launches; otherwise every option on."""
    constants: dict[str, Any] = {
        "TILE": TILE, "COLUMNS": configs.COLUMNS, "PRECISION": "ieee", "EVEN": True, "WITH_MEAN": True,
        "BLOCK": 2048, "BLOCK_D": 64, "BLOCK_N": 16, "BLOCK_K": 128, "BLOCK_T": 16, "ROWS": 8,
        "MASS": triton.language.bfloat16,
    }  # fmt: skip
    if blocks is not None:
        outer, inner = BLOCK_NAMES[name]
        constants |= {outer: blocks.outer, inner: blocks.inner}
    known = TYPES | constants | ODD.get(name, {}) | (PLAIN if plain else {})
    out: dict[str, Any] = {}
    for p in KERNELS[name].params:
        value = known.get(p.name, "*fp32")
        out[p.name] = value.replace("bf16", dtype) if isinstance(value, str) and not p.is_constexpr else value
    return out


@functools.cache
def compiled(name: str, arch: int, plain: bool = True) -> aot.Compiled:
    blocks = None
    if name in MATRIX:
        blocks = getattr(configs.config(torch.bfloat16, 4096, aot.chip(arch)), name.removesuffix("_kernel"))
    warps, stages = (blocks.warps, blocks.stages) if blocks else (4, 3)
    return aot.compile_kernel(KERNELS[name], arguments(name, blocks, plain), arch, warps, stages)


@pytest.mark.parametrize("arch", sorted(aot.SHARED_LIMIT))
@pytest.mark.parametrize("name", MATRIX)
def test_matrix_kernels_fit(name, arch):
    assert 0 < compiled(name, arch).shared <= aot.SHARED_LIMIT[arch]


@pytest.mark.parametrize("arch", [80, 90])  # of Blackwell's configuration, which is Hopper's, options change nothing
@pytest.mark.parametrize("name", ["scan_kernel", "dlogit_kernel"])  # the others' options add no block of values
def test_matrix_kernels_with_every_option_fit(name, arch):
    assert compiled(name, arch, plain=False).shared <= aot.SHARED_LIMIT[arch]


@pytest.mark.parametrize("name", MATRIX)
def test_hopper_runs_on_its_tensor_cores_without_spills(name):
    kernel = compiled(name, 90)
    assert "HGMMA" in kernel.sass
    assert kernel.spills == 0, kernel


@pytest.mark.parametrize("name", ["dlogit_kernel", "dweight_kernel"])  # dx_kernel's options are vectors of a row
def test_nor_with_every_option(name):
    assert compiled(name, 90, plain=False).spills == 0


OTHERS = sorted(set(KERNELS) - set(MATRIX))


@pytest.mark.parametrize("name", OTHERS)
def test_the_other_kernels_compile(name):
    kernel = compiled(name, 90, plain=False)
    assert kernel.shared <= min(aot.SHARED_LIMIT.values())
    assert kernel.spills == 0, kernel


@pytest.mark.parametrize("name", MATRIX)
def test_float32_kernels_fit_everywhere(name):
    """Exact float32 products compile, and fit the smallest shared memory in use (AMD's 64 KiB)."""
    blocks = getattr(configs.config(torch.float32, 4096, aot.chip(80, 64 * 1024)), name.removesuffix("_kernel"))
    arguments_ = arguments(name, blocks, plain=True, dtype="fp32")
    kernel = aot.compile_kernel(KERNELS[name], arguments_, 80, blocks.warps, blocks.stages)
    assert kernel.shared <= 64 * 1024


@pytest.mark.parametrize("name", MATRIX)
def test_half_precision_kernels_fit_small_devices(name):
    """Consumer GPUs (99 KiB) take the narrow blocks."""
    blocks = getattr(configs.config(torch.bfloat16, 4096, aot.chip(89, 99 * 1024)), name.removesuffix("_kernel"))
    kernel = aot.compile_kernel(KERNELS[name], arguments(name, blocks, True), 89, blocks.warps, blocks.stages)
    assert kernel.shared <= 64 * 1024
