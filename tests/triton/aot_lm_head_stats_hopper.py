"""The scan by descriptors of ``lm_head_stats``, compiled without a GPU at the shapes of Llama-3-8B's head in bf16."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import aot
import pytest
import torch
import triton.language as tl

from fastguard.ops import table
from fastguard.ops.lm_head_stats.op import TILE
from fastguard.ops.lm_head_stats.triton import configs, hopper
from fastguard.ops.lm_head_stats.triton.scan import Parts

SIZES = dict.fromkeys(("N", "V", "D", "stride_columns"), "i32/16")
COUNTS = dict.fromkeys(("n_tiles", "n_parts", "n_blocks", "top"), "i32")


@dataclass(frozen=True)
class Call:
    """What a call asks for."""

    record: bool = True
    bias: bool = False
    softcap: bool = False
    mean: bool = False


PLAIN = Call()
CALLS = [Call(record=False), PLAIN, Call(bias=True), Call(softcap=True), Call(mean=True), Call(True, True, True, True)]


@functools.cache
def compiled(call: Call, arch: int = 90) -> aot.Compiled:
    plain = not (call.bias or call.softcap or call.mean)
    shapes = configs.by_descriptors(torch.bfloat16, 4096, options=not plain)
    blocks = table.find(configs.BY_DESCRIPTORS, shapes, aot.chip(arch), configs.Blocks)
    known = SIZES | COUNTS | {
        "d_x": f"tensordesc<bf16[{TILE}, {blocks.inner}]>",
        "d_weight": f"tensordesc<bf16[{blocks.outer}, {blocks.inner}]>",
        "p_bias": "*bf16" if call.bias else None, "p_target": "*i64", "p_columns": "*u8" if call.record else None,
        "p_parts": Parts("*fp32", "*fp32", "*fp32" if call.mean else None, "*fp32" if call.record else None),
        "softcap": "fp32" if call.softcap else None, "scale": "fp32", "log_v": "fp32",
        "TILE": TILE, "BLOCK_V": blocks.outer, "BLOCK_K": blocks.inner, "OCTAVES": plain, "MASS": tl.bfloat16,
    }  # fmt: skip
    kernel = hopper.scan_descriptors_kernel
    arguments = {p.name: known.get(p.name, "*fp32") for p in kernel.params}
    out = aot.compile_kernel(kernel, arguments, arch, blocks.warps, blocks.stages)
    print(call, out)
    return out


def loops(out: aot.Compiled) -> tuple[list[str], list[str]]:
    """The instructions of a step of features, and those of a step of columns beside it."""
    lines = [line for line in out.sass.splitlines() if re.match(r"\s+/\*[0-9a-f]{4,}\*/|\.L_x_\d+:", line)]
    products = [i for i, line in enumerate(lines) if re.search(r"HGMMA\.64x(128|256)x16", line)]
    where = {line[:-1]: i for i, line in enumerate(lines) if line.startswith(".L_x")}
    back = [(where[m[1]], i) for i, line in enumerate(lines) if (m := re.search(r"BRA `\((\.L_x_\d+)\)", line))]
    around = sorted((end - begin, begin, end) for begin, end in back if begin < products[0] and end > products[-1])
    (_, first, last), (_, begin, end) = around[0], around[-1]  # the inner loop, the outer
    return lines[first:last], lines[begin:first] + lines[last:end]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_what_a_step_is_made_of(call):
    """Operands by TMA, one wide product of them, and next to nothing in local memory: none of it per feature."""
    out = compiled(call)
    assert out.shared <= aot.SHARED_LIMIT[90]
    loads, copies = out.sass.count("UTMALDG"), out.sass.count("LDGSTS")
    assert loads > 0 and copies == 0
    inner, outer = loops(out)
    local = [sum("LDL" in line or "STL" in line for line in lines) for lines in (inner, outer)]
    assert local[0] == 0 and local[1] <= 2 and out.spills <= 12


def test_the_products_do_not_wait_long():
    """A step of 256 columns takes the tensor cores 63,000 cycles at D = 4096, and eight warps this much beside it."""
    out = compiled(PLAIN)
    inner, outer = loops(out)
    assert sum("HGMMA.64x256x16" in line for line in inner) == 4  # 64 features
    assert sum("HGMMA.64x16x16" in line for line in outer) == 16  # what each threshold would drop is a product too
    assert sum("SHFL" in line for line in outer) <= 128
    assert len(outer) <= 2700  # of which 470 only where a target or the end of V lies in the step


def test_it_fits_blackwell():
    assert compiled(PLAIN, 100).shared <= aot.SHARED_LIMIT[100]
