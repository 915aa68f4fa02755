"""A batch in pieces, so that the activations of a few samples are there at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastguard.over_ranks import gathered, several
from fastguard.ranks import DataRanks


def size(batch: Mapping[str, Any]) -> int:
    """How many samples a batch has, or each of several by name."""
    first = next(iter(batch.values()))
    return len(first) if isinstance(first, Tensor) else size(first)


def pieces(batch: Mapping[str, Any], micro: int, ranks: DataRanks | None) -> int:
    """Into how many pieces of at most ``micro`` samples the batch is divided: as many as on the other ranks.

    Raises ValueError, on every rank alike, where one of them has fewer samples than that.
    """
    sizes = [n for (n,) in gathered([size(batch)], ranks)] if several(ranks) else [size(batch)]  # type: ignore[arg-type]
    found = max(-(-n // micro) for n in sizes)
    if min(sizes) < found:
        raise ValueError(f"micro: expected batches that make {found} pieces on every rank, got {sizes} samples")
    return found


def divided(batch: Mapping[str, Any], number: int) -> list[dict[str, Any]]:
    """A batch, or several by name, as ``number`` batches of about as many samples, in their order."""
    parts = [v.tensor_split(number) if isinstance(v, Tensor) else divided(v, number) for v in batch.values()]
    return [dict(zip(batch, of_piece, strict=True)) for of_piece in zip(*parts, strict=True)]
