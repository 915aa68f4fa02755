"""Which GPU kernels have passed their float64 check, on which device and in which versions.

``fastguard bench --gpu``, also with ``--check``, checks every op on the device (``bench/checks.py``) and writes
what it found here, one file a device and version in the user's cache. ``backend.py`` chooses no GPU kernel by itself
that has no entry, or a failed one: a kernel that compiles is not yet one that computes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from fastguard.machine import write_json
from fastguard.ops import table

PROVE = "fastguard bench --gpu --check (minutes)"
"""The command that proves kernels."""


KEYS = ("gpu", "kernels", "triton", "torch")
"""What a proof holds for."""


def gpu(device: torch.device) -> str:
    """The name of a CUDA or ROCm device."""
    return torch.cuda.get_device_name(device)


@functools.cache
def kernels(configurations: Path | None = None) -> str:
    """A digest of all ops' sources and of the table of their block shapes: an edited kernel has not been checked.

    configurations: another table than the one in use.
    """
    digest = hashlib.sha256()
    sources = sorted((Path(__file__).parent / "ops").rglob("*.py"))
    for file in (*sources, configurations or table.file()):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def identity(device: torch.device) -> dict[str, str]:
    """The GPU, the kernels, and the versions of what compiles and launches them, by `KEYS`."""
    import triton

    return dict(zip(KEYS, (gpu(device), kernels(), triton.__version__, str(torch.__version__)), strict=True))


def file_of(of: Mapping[str, str]) -> Path:
    """Where the proof of an `identity` is kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "fastguard" / "proofs" / (re.sub(r"[^\w.+-]+", "_", "-".join(of.values())) + ".json")


def write(of: Mapping[str, str], found: Mapping[str, str]) -> Path:
    """Keep what was found of each folder of ops: an empty text where its kernels agreed, else what did not."""
    file = file_of(of)
    write_json(file, {**of, "ops": dict(found)})
    unproven.cache_clear()
    return file


@functools.cache
def unproven(op: str, device: torch.device) -> str | None:
    """Why the Triton kernels of the folder ``op`` are not chosen on ``device``; None where their check has passed."""
    if device.type != "cuda":
        return f"triton kernels have not been checked against float64 on {device.type}"
    of = identity(device)
    file = file_of(of)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["ops"].get(op)
    except FileNotFoundError:
        found = None
    if found is None:
        return f"triton kernels have not been checked against float64 on this {of['gpu']}: {PROVE}"
    return f"triton kernels failed their check on this {of['gpu']}: {found}" if found else None
