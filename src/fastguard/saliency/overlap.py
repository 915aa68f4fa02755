"""How far two findings of where safety sits agree: sets of weights by Jaccard's index, subspaces by their projections.

Wei et al. 2024, arXiv 2402.05162, compare the weights and the ranks that safety and utility rest on in this way.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

TILE = 2**20
"""Bytes counted at a time."""
LAYER = re.compile(r"^.*?\.\d+(?=\.)")
"""A name up to its first number, which counts layers."""


def jaccard(a: Tensor, b: Tensor) -> float:
    """|a and b| / |a or b| of two masks; 1 where both are empty.

    Args:
        a, b: bool of one shape, or packed uint8 as ``fastguard.pack_mask`` makes them (the bits behind the last entry
            are 0 in both).

    Raises:
        ValueError: masks of other dtypes, or not of one shape.
    """
    both, either = counts(a, b)
    return both / either if either else 1.0


def jaccard_by(a: Mapping[str, Tensor], b: Mapping[str, Tensor], *, by: str = "layer") -> dict[str, float]:
    """``jaccard`` of the masks of many weights, by name.

    Args:
        a, b: a mask a weight, under the same names.
        by: "tensor": each by itself; "layer": those together whose names agree up to the first number in them
            (``model.layers.3``), and by itself what has none; "model": all together, under "model".

    Raises:
        ValueError: names that differ, masks that do not fit, another ``by``.
    """
    if by not in ("tensor", "layer", "model"):
        raise ValueError(f"by: expected tensor, layer or model, got {by!r}")
    if a.keys() != b.keys():
        odd = min(a.keys() ^ b.keys())
        raise ValueError(f"b: expected the names of a, got {odd!r} in one of them alone")
    sums: dict[str, tuple[int, int]] = {}
    for name in a:
        layer = LAYER.match(name) if by == "layer" else None
        place = "model" if by == "model" else layer[0] if layer else name
        try:
            both, either = counts(a[name], b[name])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        before = sums.get(place, (0, 0))
        sums[place] = before[0] + both, before[1] + either
    return {place: both / either if either else 1.0 for place, (both, either) in sums.items()}


def counts(a: Tensor, b: Tensor) -> tuple[int, int]:
    """(|a and b|, |a or b|) of two masks, as ``jaccard`` takes them."""
    if a.dtype not in (torch.bool, torch.uint8):
        raise ValueError(f"a: expected a mask, bool or packed uint8, got {a.dtype}")
    if b.dtype != a.dtype or b.shape != a.shape:
        raise ValueError(f"b: expected {a.dtype} {list(a.shape)} as a, got {b.dtype} {list(b.shape)}")
    if a.dtype == torch.bool:
        return int((a & b).sum()), int((a | b).sum())
    table = torch.tensor([byte.bit_count() for byte in range(256)], dtype=torch.uint8, device=a.device)
    both = either = 0
    for x, y in zip(a.flatten().split(TILE), b.flatten().split(TILE), strict=True):
        both += int(table[(x & y).int()].sum())
        either += int(table[(x | y).int()].sum())
    return both, either


def subspace_overlap(a: Tensor, b: Tensor) -> float:
    """||A^T B||_F^2 / min(r_a, r_b) of two subspaces: 1 where the lesser lies in the other, 0 where none of it does.

    Args:
        a: [O, r_a] orthonormal columns, as ``act_svd.top_subspace`` gives them. b: [O, r_b], on the same device.

    Raises:
        ValueError: shapes that do not fit, no column, or columns that are not orthonormal (to 1e-3).
    """
    for name, basis in (("a", a), ("b", b)):
        if basis.dim() != 2 or not 0 < basis.shape[1] <= basis.shape[0] or basis.shape[0] != a.shape[0]:
            rows = a.shape[0] if a.dim() == 2 else "O"
            raise ValueError(f"{name}: expected [{rows}, r] with 1 to {rows} columns, got {list(basis.shape)}")
        wide = basis.double()
        off = (wide.mT @ wide - torch.eye(basis.shape[1], dtype=wide.dtype, device=wide.device)).abs().max()
        if not float(off) <= 1e-3:
            raise ValueError(f"{name}: expected orthonormal columns, got products off by {float(off):.1e}")
    return float((a.double().mT @ b.double()).square().sum()) / min(a.shape[1], b.shape[1])
