"""What the ops that project ask of a basis: shape, dtype, and rows that are orthonormal, looked at once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fastguard.ops import transforms

MAX_DIRECTIONS = 64
"""Rows that a basis may have."""

TOLERANCE = 1e-4
"""Largest entry of Q Q^T - I that passes for rounding; rows kept in bf16 miss it by an order of magnitude."""

_seen: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""The version of each basis at which its rows were found orthonormal."""


def check_basis(basis: Tensor, width: int, device: torch.device, basis_index: Tensor | None) -> None:
    """Raise a ValueError that names what does not fit ``width`` features on ``device``.

    basis: [K, D], or [G, K, D] where there is a ``basis_index``; fp32 or float64.
    """
    transforms.check_plain(basis=basis, basis_index=basis_index)
    expected = f"[K, {width}]" if basis_index is None else f"[G, K, {width}] with a basis_index"
    dims = 2 if basis_index is None else 3
    if basis.dim() != dims or basis.shape[-1] != width or not basis.numel():
        raise ValueError(f"basis: expected {expected}, got shape {tuple(basis.shape)}")
    if basis.shape[-2] > MAX_DIRECTIONS:
        raise ValueError(f"basis: expected at most {MAX_DIRECTIONS} directions, got {basis.shape[-2]}")
    if basis.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"basis: expected float32 or float64 whatever the activations are, got {basis.dtype}, in which no "
            "direction has length 1"
        )
    if basis.device != device:
        raise ValueError(f"basis: expected device {device}, got {basis.device}")
    _check_rows(basis)


def _check_rows(basis: Tensor) -> None:
    """Orthonormal rows: looked at once for each version of a tensor, since a GPU must be waited for to know."""
    if torch.compiler.is_compiling() or transforms.under_func() or basis.device.type == "meta":
        return
    version = -1 if basis.is_inference() else basis._version  # inference tensors do not count versions
    if _seen.get(basis) == version:
        return
    worst = deviation(basis)
    if not worst <= TOLERANCE:
        raise ValueError(
            f"basis: expected orthonormal rows, got rows whose products differ from the identity by {worst:.1e}; "
            "make it with fastguard.directions.orthonormalise"
        )
    _seen[basis] = version


def deviation(basis: Tensor) -> float:
    """The largest entry of Q Q^T - I, in float64; basis: [..., K, D]."""
    rows = basis.detach().double()
    gram = rows @ rows.mT
    return float((gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)).abs().max())


def check_index(index: Tensor, shape: torch.Size, device: torch.device) -> None:
    """Raise a ValueError unless ``index`` holds integers for the leading dimensions of rows of ``shape`` [..., D]."""
    if index.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"basis_index: expected int64 or int32, got {index.dtype}")
    if not 1 <= index.dim() < len(shape) or index.shape != shape[: index.dim()]:
        raise ValueError(f"basis_index: expected leading dimensions of {tuple(shape)}, got shape {tuple(index.shape)}")
    if index.device != device:
        raise ValueError(f"basis_index: expected device {device}, got {index.device}")


def check_range(index: Tensor | None, groups: int) -> None:
    """Raise a ValueError (an assertion on the device) if an index is not one of -1 .. groups - 1."""
    if index is None or index.numel() == 0:
        return
    fits = ((index >= -1) & (index < groups)).all()
    if index.device.type != "cpu":
        torch._assert_async(fits, f"basis_index: expected -1 (no basis) to {groups - 1}")
    elif not fits:
        low, high = int(index.min()), int(index.max())
        raise ValueError(f"basis_index: expected -1 (no basis) to {groups - 1}, got {low} to {high}")
