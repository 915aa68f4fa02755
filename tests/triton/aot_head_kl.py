"""The GPU kernels of ``head_kl``, compiled without a GPU at the shapes of Llama-3-8B's head in bf16."""

from __future__ import annotations

import functools
from typing import Any

import aot
import pytest
import torch

from fastguard.ops.head_kl import triton as ops

DTYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
MATRIX = ("scan_kernel", "dlogit_kernel")
WIDE = {"p_sums", "p_grad", "p_lse", "p_gap", "p_kl"}

OPTIONS = ["", "cap", "own", "bias cap", "own cap"]
"""What a head can have: a bias, a soft-cap, a teacher with a head of its own (which excludes a bias)."""

FEW = {"bias cap": 64}
"""Spills allowed, outside of the products' loop; no published model has both."""


def arguments(name: str, blocks: ops.Blocks, options: str, dtype: torch.dtype) -> dict[str, Any]:
    """Types and constants of a kernel."""
    absent = {f"p_{option}" for option in ("bias", "own") if option not in options}
    absent |= set() if "cap" in options else {"softcap"}
    constants: dict[str, Any] = {
        "ROWS": blocks.rows, "COLUMNS": blocks.columns, "BLOCK_K": blocks.inner, "EVEN": True, "PRECISION": "ieee",
        "DIFFERENCE": dtype == torch.float32 and "own" not in options, "BLOCK": 128,
    }  # fmt: skip
    out: dict[str, Any] = {}
    for p in getattr(ops, name).params:
        if p.is_constexpr:
            out[p.name] = constants[p.name]
        elif p.name in absent:
            out[p.name] = None
        elif p.name.startswith("p_"):
            out[p.name] = "*fp32" if p.name in WIDE else DTYPES[dtype]
        elif p.name in ("N", "V", "D", "width", "first"):
            out[p.name] = "i32/16"
        else:
            out[p.name] = "fp32" if p.name in ("scale", "softcap") else "i32"
    return out


@functools.cache
def compiled(name: str, arch: int, shared: int, options: str = "", dtype: torch.dtype = torch.bfloat16) -> aot.Compiled:
    blocks = ops.config(dtype, 4096, aot.chip(arch, shared))
    warps, stages = (blocks.warps, blocks.stages) if name in MATRIX else (4, 3)
    return aot.compile_kernel(getattr(ops, name), arguments(name, blocks, options, dtype), arch, warps, stages)


@pytest.mark.parametrize(("arch", "options"), [(90, o) for o in OPTIONS] + [(80, ""), (80, "own cap"), (100, "")])
@pytest.mark.parametrize("name", MATRIX)
def test_matrix_kernels_fit_without_spills(name, arch, options):
    kernel = compiled(name, arch, aot.SHARED_LIMIT[arch], options)
    assert 0 < kernel.shared <= aot.SHARED_LIMIT[arch]
    assert kernel.spills <= FEW.get(options, 0), kernel


@pytest.mark.parametrize("name", MATRIX)
def test_hopper_runs_on_its_tensor_cores(name):
    assert "HGMMA" in compiled(name, 90, aot.SHARED_LIMIT[90]).sass


def test_combine_compiles():
    assert compiled("combine_kernel", 90, aot.SHARED_LIMIT[90]).spills == 0


@pytest.mark.parametrize("name", MATRIX)
def test_float32_kernels_fit_everywhere(name):
    """Exact float32 products fit the smallest shared memory in use (AMD's 64 KiB)."""
    kernel = compiled(name, 80, 64 * 1024, dtype=torch.float32)
    assert kernel.shared <= 64 * 1024


@pytest.mark.parametrize("options", ["", "bias cap", "own cap"])
@pytest.mark.parametrize("name", MATRIX)
def test_half_precision_kernels_fit_small_devices(name, options):
    """Consumer GPUs (99 KiB) take the narrow blocks."""
    kernel = compiled(name, 89, 99 * 1024, options)
    assert kernel.shared <= 64 * 1024
    assert kernel.spills <= FEW.get(options, 0), kernel
