"""The directions that an edit cuts out, read from a file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastguard.directions.edit import checked_basis
from fastguard.machine import write_atomically

KEY = "basis"


def read_basis(path: str | Path) -> Tensor:
    """The ``basis`` [K, D] of a directions' file (safetensors), orthonormal rows, in float64.

    Raises FileNotFoundError where there is no such file, ValueError where it holds no such tensor.
    """
    from safetensors import SafetensorError, safe_open

    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"directions: there is no file {str(file)!r}")
    try:
        with safe_open(file, "pt") as opened:
            names = list(opened.keys())
            found = opened.get_tensor(KEY) if KEY in names else None
    except SafetensorError as error:
        raise ValueError(f"directions: {str(file)!r} is no safetensors file: {error}") from None
    if found is None:
        raise ValueError(f"directions: {str(file)!r} holds {', '.join(sorted(names)) or 'nothing'}, expected {KEY!r}")
    return checked_basis(found)


def write_basis(basis: Tensor, path: str | Path, about: Mapping[str, str] | None = None) -> None:
    """Write a basis [K, D] as `read_basis` reads it, whole or not at all, with what ``about`` says of its origin.

    Raises ValueError for rows that are not orthonormal.
    """
    from safetensors.torch import save

    rows = checked_basis(basis).cpu().contiguous()
    write_atomically(Path(path), save({KEY: rows}, {"format": "pt", **(about or {})}))


def digest(basis: Tensor) -> str:
    """SHA-256 of a basis, in hex."""
    raw = basis.detach().to("cpu", torch.float64).contiguous()
    return hashlib.sha256(repr(tuple(raw.shape)).encode() + raw.numpy().tobytes()).hexdigest()
