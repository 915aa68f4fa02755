# mypy: disallow-untyped-defs=False
# (the arguments of a kernel are pointers and scalars of Triton's own; only constexprs can be annotated)
"""Packed masks as GPU kernels: a program takes CHUNK entries, eight to a byte of its own."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

import triton
from fastguard.ops.launch import on_device
from fastguard.ops.masks.portable import count

__all__ = ["apply_", "count", "pack", "unpack"]

CHUNK = 4096
"""Entries of a program."""

WARPS = 4


@triton.jit
def pack_kernel(p_mask, p_packed, n, CHUNK: tl.constexpr):
    """packed [n / 8] of mask [n] uint8, 0 or 1."""
    byte = tl.program_id(0).to(tl.int64) * (CHUNK // 8) + tl.arange(0, CHUNK // 8)
    place = tl.arange(0, 8)
    entry = byte[:, None] * 8 + place[None, :]
    b_mask = tl.load(p_mask + entry, mask=entry < n, other=0).to(tl.int32)
    tl.store(p_packed + byte, tl.sum(b_mask << place[None, :], 1).to(tl.uint8), mask=byte * 8 < n)


@triton.jit
def unpack_kernel(p_packed, p_mask, n, CHUNK: tl.constexpr):
    """mask [n] uint8, 0 or 1, of packed [n / 8]."""
    entry = tl.program_id(0).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    b_byte = tl.load(p_packed + entry // 8, mask=entry < n, other=0).to(tl.int32)
    tl.store(p_mask + entry, (b_byte >> (entry % 8).to(tl.int32) & 1).to(tl.uint8), mask=entry < n)


@triton.jit
def apply_kernel(p_entries, p_packed, p_value, n, CHUNK: tl.constexpr):
    """Entries [n], integers, become 0, or those of p_value, where the bit is set; no others are touched."""
    entry = tl.program_id(0).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    b_byte = tl.load(p_packed + entry // 8, mask=entry < n, other=0).to(tl.int32)
    chosen = ((b_byte >> (entry % 8).to(tl.int32)) & 1 != 0) & (entry < n)
    b_value = tl.zeros([CHUNK], dtype=p_entries.dtype.element_ty)
    if p_value is not None:
        b_value = tl.load(p_value + entry, mask=chosen, other=0)
    tl.store(p_entries + entry, b_value, mask=chosen)


@on_device
def _launch(kernel: Any, on: Tensor, n: int, *arguments: Any) -> None:
    if n:
        kernel[(-(-n // CHUNK),)](*arguments, n, CHUNK=CHUNK, num_warps=WARPS)


def pack(mask: Tensor) -> Tensor:
    """See ``portable.pack``."""
    packed = torch.empty((mask.numel() + 7) // 8, dtype=torch.uint8, device=mask.device)
    _launch(pack_kernel, mask, mask.numel(), mask.view(torch.uint8), packed)
    return packed


def unpack(packed: Tensor, n: int) -> Tensor:
    """See ``portable.unpack``."""
    mask = torch.empty(n, dtype=torch.uint8, device=packed.device)
    _launch(unpack_kernel, packed, n, packed, mask)
    return mask.view(torch.bool)


def apply_(entries: Tensor, packed: Tensor, value: Tensor | None) -> None:
    """See ``portable.apply_``."""
    _launch(apply_kernel, packed, entries.numel(), entries, packed, value)
