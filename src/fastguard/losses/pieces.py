"""A batch in pieces, so that the activations of a few samples are there at a time; and several batches as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

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


FILL = {"input_ids": 0, "attention_mask": 0, "labels": -100}
"""What sequences are padded with."""


def joined(batches: Sequence[Mapping[str, Tensor]], name: str = "batches") -> dict[str, Tensor]:
    """Batches of as many samples each as one, in their order: [count * B, T], padded on the right to one length.

    Padding is no token and carries no loss. Raises ValueError where numbers of samples or keys differ, or where there
    is something else to be padded than `FILL` knows.
    """
    if len(batches) == 1:
        return dict(batches[0])
    sizes = [size(batch) for batch in batches]
    if len(set(sizes)) != 1:
        raise ValueError(f"{name}: expected as many samples in each, got {sizes}")
    if len({batch["input_ids"].shape[1] for batch in batches}) > 1:
        batches = [_explicit(batch, name) for batch in batches]
    if len({frozenset(batch) for batch in batches}) != 1:
        raise ValueError(f"{name}: expected the same keys in each, got {[sorted(batch) for batch in batches]}")
    length = max(batch["input_ids"].shape[1] for batch in batches)
    return {key: torch.cat([_padded(batch[key], length, FILL.get(key)) for batch in batches]) for key in batches[0]}


def _explicit(batch: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """With mask and labels, which say what padding is."""
    if not batch.keys() <= FILL.keys():
        raise ValueError(f"{name}: expected {', '.join(FILL)} alone where lengths differ, got {sorted(batch)}")
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids))
    return {"input_ids": ids, "attention_mask": mask, "labels": batch.get("labels", ids.masked_fill(mask == 0, -100))}


def _padded(t: Tensor, length: int, fill: int | None) -> Tensor:
    return t if fill is None else pad(t, (0, length - t.shape[1]), value=fill)
