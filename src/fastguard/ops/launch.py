"""What the Triton backends ask of the device before they launch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

import triton
from fastguard.ops.table import Chip

P = ParamSpec("P")
R = TypeVar("R")


def on_device(function: Callable[P, R]) -> Callable[P, R]:
    """Launch on the device of the first tensor: Triton launches on the current one."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.cuda.device_of(next(a for a in args if isinstance(a, Tensor))):
            return function(*args, **kwargs)

    return call


def precision() -> str:
    """How kernels multiply fp32 operands: "tf32" where torch's own products may, else "ieee".

    Set by ``torch.set_float32_matmul_precision``, ``torch.backends.cuda.matmul.allow_tf32`` or, from torch 2.9 on, its
    ``fp32_precision``; once the last is set, reading the others raises.
    """
    try:
        return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    except RuntimeError:
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def processors(device: torch.device) -> int:
    """Programs that run at once; 4 in the interpreter, so that tests see more than one part."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may take."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]


@functools.cache
def chip(device: torch.device) -> Chip:
    """What a device's rows of the table go by; the interpreter has no shared memory to run out of."""
    if device.type != "cuda":
        return Chip("", "", 0)
    found = torch.cuda.get_device_properties(device)
    amd = torch.version.hip is not None
    capability = found.gcnArchName.partition(":")[0] if amd else f"sm_{found.major}{found.minor}"
    return Chip(found.name, capability, shared_memory(device))
