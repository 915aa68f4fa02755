"""Compile Triton kernels for GPUs that need not be there, and read what came out: what the aot_*.py tests share."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import triton

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that one program may take, by compute capability."""


class Compiled(NamedTuple):
    """What a kernel became on one target."""

    name: str
    arch: int
    shared: int  # bytes of shared memory
    registers: int
    spills: int  # local stores and loads of the SASS; each is a register that did not fit
    sass: str

    def __str__(self) -> str:
        return f"{self.name} sm_{self.arch}: {self.shared} B shared, {self.registers} registers, {self.spills} spills"


def compile_kernel(
    kernel: triton.JITFunction, arguments: dict[str, Any], arch: int, num_warps: int, num_stages: int
) -> Compiled:
    """Compile for compute capability ``arch``.

    arguments: for every parameter a Triton type ("*bf16", "i32", "fp32") or, for a constexpr and for an absent
    pointer (None), its value. Pointers are taken as 16-byte aligned; a name that ends in ``/16`` is an integer
    that is a multiple of 16, as Triton finds out by itself at launch.
    """
    types = {
        name: value for name, value in arguments.items() if isinstance(value, str) and name not in CONSTANT_STRINGS
    }
    aligned = {name for name, value in types.items() if value.startswith("*") or value.endswith("/16")}
    signature = {p.name: types[p.name].removesuffix("/16") if p.name in types else "constexpr" for p in kernel.params}
    constants = {name: value for name, value in arguments.items() if name not in types}
    attributes = {(i,): [["tt.divisibility", 16]] for i, p in enumerate(kernel.params) if p.name in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    out = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    text = sass(out.asm["cubin"])
    usage = _tool("cuobjdump", "-res-usage", cubin=out.asm["cubin"])
    registers = int(re.search(r"REG:(\d+)", usage).group(1))  # type: ignore[union-attr]
    spills = len(re.findall(r"\b(?:STL|LDL)\b", text))
    return Compiled(kernel.__name__, arch, out.metadata.shared, registers, spills, text)


CONSTANT_STRINGS = {"PRECISION"}
"""Constexprs whose value is a string."""


def sass(cubin: bytes) -> str:
    """Disassembly of a cubin."""
    return _tool("nvdisasm", "-c", cubin=cubin)


def _tool(name: str, *options: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([_path(name), *options, file.name], capture_output=True, text=True, check=True).stdout


@functools.cache
def _path(name: str) -> str:
    """A CUDA binary tool as triton ships it."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)
