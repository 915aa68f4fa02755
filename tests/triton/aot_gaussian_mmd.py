"""The GPU kernels of ``gaussian_mmd``, compiled without a GPU for what a RepNoise step launches, and for the rest."""

from __future__ import annotations

import functools
from typing import Any

import aot
import pytest

from fastguard.ops.gaussian_mmd import triton as ops

POINTERS = {"p_mask": "*u8", "p_order": "*i32", "p_live": "*i32", "p_call": "*i64"}
SIZES = {"F": "i32/16", "stride_l": "i64/16", "stride_b": "i32/16"}
COUNTS = dict.fromkeys(
    ("B", "T", "D", "per_token", "layer", "sample_offset", "n_tiles", "n_spans", "stride_grad"), "i32"
)
SEEDS = dict.fromkeys(("seed_low", "seed_high"), "i64")
TYPES = POINTERS | SIZES | COUNTS | SEEDS

LARGE = ("gram_kernel", "gradient_kernel")
SMALL = ("order_kernel", "reduce_kernel", "mmd_kernel", "coefficient_kernel")


def arguments(name: str, blocks: ops.Blocks, samples: int, dtype: str, **flags: Any) -> dict[str, Any]:
    """Types and constants of a kernel for a batch of ``samples`` of dtype *bf16, *fp16 or *fp32."""
    constants = {
        "SAMPLES": samples, "COUNTERS": blocks.counters, "ONE_TILE": True, "ALIGNED": True, "HAS_MASK": True,
        "HAS_NOISE": False, "TOKENS": 1024, "SPANS": 32, "WORDS": max(1, 8 // samples), "ROWS": ops.ROWS,
        "COLUMNS": 2 * samples,
    } | flags  # fmt: skip
    types = TYPES | {"p_x": dtype, "p_dx": dtype}
    absent = set() if constants["HAS_NOISE"] else {"p_noise"}
    absent |= set() if constants["HAS_MASK"] else {"p_mask", "p_order", "p_live"}
    out: dict[str, Any] = {}
    for p in getattr(ops, name).params:
        if p.is_constexpr:
            out[p.name] = constants[p.name]
        else:
            out[p.name] = None if p.name in absent else types.get(p.name, "*fp32")
    return out


@functools.cache
def _compiled(name: str, arch: int, samples: int, dtype: str, flags: tuple[tuple[str, Any], ...]) -> aot.Compiled:
    if name == "gram_kernel":
        blocks = ops.gram_blocks(samples, dict(flags).get("ONE_TILE", True), aot.chip(arch))
    else:
        blocks = ops.gradient_blocks(aot.chip(arch))
    types = arguments(name, blocks, samples, dtype, **dict(flags))
    return aot.compile_kernel(getattr(ops, name), types, arch, blocks.warps, 3)


def compiled(name: str, arch: int, samples: int = 8, dtype: str = "*bf16", **flags: Any) -> aot.Compiled:
    out = _compiled(name, arch, samples, dtype, tuple(flags.items()))
    assert out.shared <= aot.SHARED_LIMIT[arch]
    return out


@pytest.mark.parametrize("arch", sorted(aot.SHARED_LIMIT))
@pytest.mark.parametrize("name", LARGE)
def test_what_a_step_launches_does_not_spill(name, arch):
    assert compiled(name, arch).spills == 0


@pytest.mark.parametrize("samples", [2, 4, ops.MAX_SAMPLES])
@pytest.mark.parametrize("name", LARGE)
def test_no_batch_spills_on_hopper(name, samples):
    assert compiled(name, 90, samples).spills == 0


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize(
    ("dtype", "flags"),
    [
        ("*fp32", {}),
        ("*fp16", {"HAS_MASK": False}),
        ("*bf16", {"ALIGNED": False}),
        ("*fp32", {"HAS_NOISE": True, "ALIGNED": False}),
    ],
)
def test_other_launches_do_not_spill_on_hopper(name, dtype, flags):
    assert compiled(name, 90, ops.MAX_SAMPLES, dtype, **flags).spills == 0


def test_pairs_of_tiles_do_not_spill_on_hopper():
    assert compiled("gram_kernel", 90, ops.MAX_SAMPLES, ONE_TILE=False).spills == 0


@pytest.mark.parametrize("name", SMALL)
def test_the_small_kernels_compile(name):
    assert compiled(name, 90).spills == 0


@pytest.mark.parametrize("name", ["mmd_kernel", "coefficient_kernel"])
def test_large_batches_have_large_matrices(name):
    """512 samples: rows of 1024 distances in a program's registers."""
    compiled(name, 90, COLUMNS=1024)


def test_what_the_step_is_made_of():
    """Products on tensor cores, gradients stored eight bf16 at a time, no call into a software function."""
    gram, gradient = (compiled(name, 90).sass for name in LARGE)
    assert "HMMA" in gram and "TF32" in gram
    assert "STG.E.128" in gradient
    assert "CALL" not in gram + gradient
