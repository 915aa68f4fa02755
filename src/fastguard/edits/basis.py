"""The directions that an edit cuts out, read from a file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastguard.directions.edit import checked_basis
from fastguard.directions.file import BASIS, read_tensors, write_tensors


def read_basis(path: str | Path) -> Tensor:
    """The ``basis`` [K, D] of a directions' file (safetensors), orthonormal rows, in float64.

    Raises FileNotFoundError where there is no such file, ValueError where it holds no such tensor.
    """
    return checked_basis(read_tensors(path, BASIS)[0][BASIS])


def write_basis(basis: Tensor, path: str | Path, about: Mapping[str, str] | None = None) -> None:
    """Write a basis [K, D] as `read_basis` reads it, whole or not at all, with what ``about`` says of its origin.

    Raises ValueError for rows that are not orthonormal.
    """
    rows = checked_basis(basis)
    write_tensors(path, {BASIS: rows}, {"format": "pt", **(about or {})})


def digest(basis: Tensor) -> str:
    """SHA-256 of a basis, in hex."""
    raw = basis.detach().to("cpu", torch.float64).contiguous()
    return hashlib.sha256(repr(tuple(raw.shape)).encode() + raw.numpy().tobytes()).hexdigest()
