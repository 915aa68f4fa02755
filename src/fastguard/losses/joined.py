"""Batches of different shapes as one, so that a loss that reads several of them runs its model once."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

PADDING = {"input_ids": 0, "attention_mask": 1, "labels": -100}
"""What is put behind the shorter batches. It is attended to, by itself alone: in a causal model no earlier token sees
it, and a row that is masked for longer than a sliding window would be NaN."""


def joined(batches: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One batch of all samples in the order given, padded on the right to one length.

    ``labels`` [B, T] are those given, else the tokens that the attention mask keeps, else all; -100 elsewhere.

    Raises a ValueError that names the batch: no mapping of ``input_ids`` [B, T], or entries other than ``PADDING``'s.
    """
    parts: list[dict[str, Tensor]] = []
    for name, batch in batches.items():
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            raise ValueError(f"{name}: expected input_ids of shape [B, T]")
        unknown = sorted(set(batch) - set(PADDING))
        if unknown:
            raise ValueError(f"{name}: expected entries {', '.join(PADDING)}, got also {', '.join(unknown)}")
        mask = batch.get("attention_mask", torch.ones_like(ids))
        labels = batch.get("labels", ids.masked_fill(mask == 0, -100))
        parts.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    length = max(part["input_ids"].shape[1] for part in parts)
    return {
        key: torch.cat([nn.functional.pad(p[key], (0, length - p[key].shape[1]), value=fill) for p in parts])
        for key, fill in PADDING.items()
    }
