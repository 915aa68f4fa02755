"""Compile Triton kernels for GPUs that need not be there, and read what came out: what the aot_*.py tests share."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import triton
from fastguard.ops.table import Chip

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that one program may take, by compute capability."""


def chip(arch: int, shared: int | None = None) -> Chip:
    """A GPU of a compute capability, of which nothing was measured."""
    return Chip("", f"sm_{arch}", SHARED_LIMIT[arch] if shared is None else shared)


@dataclass(frozen=True)
class Compiled:
    """What a kernel became on one target; disassembled when a test first asks."""

    name: str
    arch: int
    shared: int  # bytes of shared memory
    cubin: bytes = field(repr=False)

    @functools.cached_property
    def sass(self) -> str:
        """The disassembly."""
        return _tool("nvdisasm", "-c", cubin=self.cubin)

    @functools.cached_property
    def registers(self) -> int:
        """Registers of a thread."""
        usage = _tool("cuobjdump", "-res-usage", cubin=self.cubin)
        return int(re.search(r"REG:(\d+)", usage).group(1))  # type: ignore[union-attr]

    @functools.cached_property
    def spills(self) -> int:
        """Local stores and loads; each is a register that did not fit."""
        return len(re.findall(r"\b(?:STL|LDL)\b", self.sass))

    def __str__(self) -> str:
        return f"{self.name} sm_{self.arch}: {self.shared} B shared, {self.registers} registers, {self.spills} spills"


def compile_kernel(
    kernel: triton.JITFunction, arguments: dict[str, Any], arch: int, num_warps: int, num_stages: int
) -> Compiled:
    """Compile for compute capability ``arch``.

    arguments: for every parameter a Triton type ("*bf16", "i32", "fp32") or, for a constexpr and for an absent
    pointer (None), its value; for a tuple of arguments a tuple of those. Pointers are taken as 16-byte aligned; a name
    that ends in ``/16`` is an integer that is a multiple of 16, as Triton finds out by itself at launch.
    """
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def typed(value: Any, path: tuple[int, ...], constant: bool) -> Any:
        if isinstance(value, tuple) and not constant:
            inner = [typed(item, (*path, i), False) for i, item in enumerate(value)]
            return type(value)(*inner) if hasattr(value, "_fields") else tuple(inner)
        if constant or value is None:
            constants[path] = value
            return "constexpr"
        if value.startswith("*") or value.endswith("/16"):
            attributes[path] = [["tt.divisibility", 16]]
        return value.removesuffix("/16")

    signature = {p.name: typed(arguments[p.name], (i,), p.is_constexpr) for i, p in enumerate(kernel.params)}
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    out = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return Compiled(kernel.__name__, arch, out.metadata.shared, out.asm["cubin"])


def _tool(name: str, *options: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([_path(name), *options, file.name], capture_output=True, text=True, check=True).stdout


@functools.cache
def _path(name: str) -> str:
    """A CUDA binary tool as triton ships it."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)
