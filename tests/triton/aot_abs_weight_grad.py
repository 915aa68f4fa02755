"""The GPU kernel of ``abs_weight_grad_``, compiled without a GPU."""

from __future__ import annotations

import aot
import pytest
import torch

from fastguard.ops.abs_weight_grad import triton as ops

DTYPES = {"*bf16": torch.bfloat16, "*fp16": torch.float16, "*fp32": torch.float32}
STATES = ("p_score", "p_squared", "p_signed")


def compiled(arch, dtype="*bf16", states=1, size=4096, precision="ieee", flat=True):
    blocks = ops.blocks_of(size, size, states, DTYPES[dtype], aot.chip(arch))
    types = {
        "p_dy": dtype, "p_x": dtype, "p_bounds": "*i64", "FLAT": flat, "PRECISION": precision,
        "BLOCK_O": blocks.outputs, "BLOCK_I": blocks.inputs, "BLOCK_T": blocks.tokens,
        **{name: "*fp32" if i < states else None for i, name in enumerate(STATES)},
        **dict.fromkeys(("O", "I", *(p.name for p in ops.sums_kernel.params if p.name.startswith("stride"))), "i32/16"),
    }  # fmt: skip
    arguments = {p.name: types.get(p.name, "i32") for p in ops.sums_kernel.params}
    out = aot.compile_kernel(ops.sums_kernel, arguments, arch, blocks.warps, blocks.stages)
    print(out)
    assert out.shared <= aot.SHARED_LIMIT[arch]
    return out


@pytest.mark.parametrize("arch", sorted(aot.SHARED_LIMIT))
@pytest.mark.parametrize("size", [576, 4096])
@pytest.mark.parametrize("states", [1, 2, 3])
def test_it_does_not_spill(arch, states, size):
    assert compiled(arch, states=states, size=size).spills == 0


@pytest.mark.parametrize(
    "options",
    [{"dtype": "*fp16"}, {"dtype": "*fp32"}, {"dtype": "*fp32", "precision": "tf32"}, {"flat": False}],
    ids=str,
)
@pytest.mark.parametrize("states", [1, 3])
def test_nor_for_other_operands_on_hopper(states, options):
    assert compiled(90, states=states, **options).spills == 0


def test_what_it_is_made_of():
    """Products on tensor cores, both operands copied to shared memory ahead of them, no call of software."""
    ampere, hopper = compiled(80).sass, compiled(90).sass
    assert "HMMA" in ampere and "HGMMA" in hopper
    assert ampere.count("LDGSTS") == hopper.count("LDGSTS") == 3 * 2 * 4  # stages, operands, 16 bytes of a thread
    assert "CALL" not in hopper
