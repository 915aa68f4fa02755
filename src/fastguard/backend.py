"""Which backend serves which op on which device.

An op's folder holds one module per backend. A backend module exposes plain functions over tensors, all
with the same signatures; ``op.py`` asks :func:`choose` for the module and never names one itself.

==========  ================================================================================
backend     what runs
==========  ================================================================================
triton      fused GPU kernels (CUDA and ROCm) that passed their check on the device (``proof.py``);
            also the CPU under ``TRITON_INTERPRET=1``
cpu         products by oneDNN/MKL through torch, everything between them by csrc/cpu
portable    products and element-wise code by torch, in tiles; any device, no compiler
==========  ================================================================================
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from types import ModuleType

import torch

from fastguard import proof

BACKENDS = ("triton", "cpu", "portable")


@functools.cache
def unavailable(backend: str, device_type: str) -> str | None:
    """Why ``backend`` cannot serve tensors on ``device_type``; None if it can."""
    from fastguard import _extension

    if backend == "portable":
        return None
    if backend == "cpu":
        return _extension.load() if device_type == "cpu" else "serves CPU tensors only"
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed (pip install 'fastguard-kernels[gpu]')"
        if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "triton needs a GPU (or TRITON_INTERPRET=1, for tests)"
        return None
    raise ValueError(f"FASTGUARD_BACKEND: unknown backend {backend!r}, expected one of {', '.join(BACKENDS)}")


def refused(backend: str, op: str, device: torch.device) -> str | None:
    """Why ``backend`` is not chosen for ``op`` on ``device`` unless it is forced; None if it may be."""
    reason = unavailable(backend, device.type)
    if reason is None and backend == "triton" and device.type != "cpu":
        reason = proof.unproven(op, device)
        if reason is not None:
            _say(reason)
    return reason


@functools.cache
def _say(reason: str) -> None:
    """Once each."""
    logging.getLogger(__name__).warning("GPU ops run on the slower portable backend: %s", reason)


def backend_name(op: str, device: torch.device) -> str:
    """The name of the backend that serves ``op`` on ``device``.

    ``FASTGUARD_BACKEND`` forces one; a forced backend that cannot serve the device raises RuntimeError
    rather than falling back in silence.
    """
    forced = os.environ.get("FASTGUARD_BACKEND")
    if forced:
        reason = unavailable(forced, device.type)
        if reason is not None:
            raise RuntimeError(f"FASTGUARD_BACKEND={forced}: cannot serve {op} on {device.type}: {reason}")
        return forced
    order = ("cpu", "portable") if device.type == "cpu" else ("triton", "portable")
    return next(name for name in order if refused(name, op, device) is None)


def choose(op: str, device: torch.device) -> ModuleType:
    """The backend module ``fastguard.ops.<op>.<backend>`` that serves ``device``; imported on first use."""
    return importlib.import_module(f"fastguard.ops.{op}.{backend_name(op, device)}")
