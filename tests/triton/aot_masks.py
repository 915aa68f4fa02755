"""The GPU kernels of packed masks, compiled without a GPU."""

from __future__ import annotations

import aot
import pytest

from fastguard.ops.masks import triton as ops

ARCHES = [80, 90, 100]


def compiled(name: str, arch: int, entries: str = "*i32", value: str | None = "*i32") -> aot.Compiled:
    types = {"p_mask": "*u8", "p_packed": "*u8", "p_entries": entries, "p_value": value, "n": "i64", "CHUNK": ops.CHUNK}
    kernel = getattr(ops, name)
    out = aot.compile_kernel(kernel, {p.name: types[p.name] for p in kernel.params}, arch, ops.WARPS, 3)
    assert out.shared <= aot.SHARED_LIMIT[arch]
    return out


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("name", ["pack_kernel", "unpack_kernel", "apply_kernel"])
def test_no_spills(name, arch):
    assert compiled(name, arch).spills == 0


@pytest.mark.parametrize("entries", ["*u8", "*i16", "*i32", "*i64"])
def test_every_width_with_and_without_values(entries):
    """Without values the weight is not read."""
    assert compiled("apply_kernel", 90, entries, entries).spills == 0
    alone = compiled("apply_kernel", 90, entries, None)
    assert alone.spills == 0
    assert alone.sass.count("LDG") < compiled("apply_kernel", 90, entries, entries).sass.count("LDG")
