"""The GPU kernels of ``multi_tensor``, compiled without a GPU for the dtypes of full fine-tuning and of LoRA."""

from __future__ import annotations

import functools
from typing import Any

import aot
import pytest
import triton.language as tl

from fastguard.ops.multi_tensor import triton as ops

POINTERS = {"p_table": "*i64", "p_sizes": "*i64", "p_tensor": "*i32", "p_number": "*i32", "p_partial": "*fp32"}
COUNTS = dict.fromkeys(("n_tensors", "n_chunks"), "i32")
TYPES = POINTERS | COUNTS | {"p_scale": "*fp32", "p_weight": "*fp32"}

KERNELS = ("dot_kernel", "accumulate_kernel", "perturb_kernel", "adamw_kernel")

# dtypes of the lists, as many as the kernel has
FP32 = (tl.float32,) * 4
BF16 = (tl.bfloat16,) * 4
MIXED = (tl.bfloat16, tl.bfloat16, tl.float32, tl.float32)  # AdamW with fp32 moments; perturbation from fp32 masters


@functools.cache
def compiled(name: str, arch: int, dtypes: tuple[tl.dtype, ...], **flags: Any) -> aot.Compiled:
    constants = dict(zip("ABCD", dtypes, strict=True)) | {
        "ALIGNED": True, "CHUNK": ops.CHUNK, "BLOCK": ops.BLOCK, "SQUARE": False, "THROUGH": dtypes[0], "SOURCE": True,
    } | flags  # fmt: skip
    kernel = getattr(ops, name)
    arguments = {p.name: constants[p.name] if p.is_constexpr else TYPES.get(p.name, "fp32") for p in kernel.params}
    out = aot.compile_kernel(kernel, arguments, arch, ops.WARPS, 3)
    assert out.shared <= aot.SHARED_LIMIT[arch]
    return out


LAUNCHES = [(90, FP32), (90, BF16), (90, MIXED), (80, MIXED), (100, MIXED)]


@pytest.mark.parametrize(("arch", "dtypes"), LAUNCHES, ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_no_spills_and_few_registers(name, arch, dtypes):
    """At most 80 registers: 24 warps on a multiprocessor, each with 16 bytes a thread and list on the way."""
    kernel = compiled(name, arch, dtypes)
    assert kernel.spills == 0
    assert kernel.registers <= 80


@pytest.mark.parametrize(("arch", "dtypes"), LAUNCHES, ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_aligned_tensors_move_128_bits_at_a_time(name, arch, dtypes):
    """Every list that is read or written, in whole blocks; the rest of a tensor goes element by element."""
    sass = compiled(name, arch, dtypes).sass
    lists = {"dot_kernel": (2, 0), "accumulate_kernel": (2, 1), "perturb_kernel": (3, 1), "adamw_kernel": (4, 3)}
    assert sass.count("LDG.E.128") >= lists[name][0]
    assert sass.count("STG.E.128") >= lists[name][1]


@pytest.mark.parametrize("name", KERNELS)
def test_unaligned_tensors_have_a_launch_of_their_own(name):
    sass = compiled(name, 90, BF16, ALIGNED=False).sass
    assert "LDG.E.128" not in sass and "STG.E.128" not in sass


def test_a_norm_reads_one_list():
    assert compiled("dot_kernel", 90, FP32, SQUARE=True).sass.count("LDG.E.128") < compiled(
        "dot_kernel", 90, FP32
    ).sass.count("LDG.E.128")
