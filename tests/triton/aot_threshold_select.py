"""The GPU kernels of ``threshold_select``, compiled without a GPU for scores alone and for scores of weights."""

from __future__ import annotations

import functools

import aot
import pytest
import torch
from triton.language import float32, float64

from fastguard.ops.threshold_select import keys
from fastguard.ops.threshold_select import triton as ops

POINTERS = {"p_prefix": "*i64", "p_counts": "*i64", "p_key": "*i64", "p_cut": "*i64", "p_mask": "*u8", "p_nan": "*i32"}
NAMES = {torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
KERNELS = ("histogram_kernel", "ties_kernel", "rows_kernel", "write_kernel")


@functools.cache
def compiled(
    name: str, arch: int, score: torch.dtype, weight: torch.dtype | None, first: bool = True, one_row: bool = True
) -> aot.Compiled:
    number = score if weight is None else keys.wide_of(torch.empty(0, dtype=score), torch.empty(0, dtype=weight))
    width = keys.bits_of(number)
    arguments = POINTERS | {
        "p_score": NAMES[score], "p_weight": None if weight is None else NAMES[weight], "n": "i64",
        "C": "i32", "k": "i32",
        "SHIFT": width - ops.BITS if first else width - 2 * ops.BITS, "FIRST": first, "ONE_ROW": one_row,
        "BITS": ops.ROW_BITS if name == "rows_kernel" else ops.BITS, "WIDTH": width, "INFINITY": ops.INFINITY[number],
        "WIDE": float64 if number == torch.float64 else float32, "NUMBER": ops.TYPES[number],
        "SPAN": ops.SPAN, "BLOCK": ops.BLOCK,
    }  # fmt: skip
    if name == "histogram_kernel" and first:
        arguments["p_prefix"] = None
    kernel = getattr(ops, name)
    out = aot.compile_kernel(kernel, {p.name: arguments[p.name] for p in kernel.params}, arch, ops.WARPS, 3)
    assert out.shared <= aot.SHARED_LIMIT[arch]
    return out


CASES = [
    (90, torch.float32, None), (90, torch.bfloat16, None), (90, torch.bfloat16, torch.bfloat16),
    (90, torch.float64, torch.float32), (80, torch.float32, torch.bfloat16), (100, torch.float32, torch.bfloat16),
]  # fmt: skip


@pytest.mark.parametrize(("arch", "score", "weight"), CASES, ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_no_spills(name, arch, score, weight):
    """At most 128 registers: 16 warps on a multiprocessor."""
    kernel = compiled(name, arch, score, weight)
    assert kernel.spills == 0
    assert kernel.registers <= 128


def test_counts_are_kept_in_shared_memory_and_added_up_once_a_span():
    for first in (True, False):
        kernel = compiled("histogram_kernel", 90, torch.float32, None, first)
        assert kernel.shared >= 4 * 2**ops.BITS
        assert "ATOMS" in kernel.sass and ("RED" in kernel.sass or "ATOMG" in kernel.sass)


def test_products_keep_denormals():
    """Flushed to zero they would tie, and a mask would differ from a CPU's."""
    sass = compiled("histogram_kernel", 90, torch.float32, torch.float32).sass
    assert "FMUL" in sass and "FMUL.FTZ" not in sass


def test_rows_that_share_bytes():
    assert compiled("write_kernel", 90, torch.float32, None, one_row=False).spills == 0
