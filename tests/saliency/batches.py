"""Small batches of conversations with answers of unequal length, padded on either side."""

from __future__ import annotations

import torch
from torch import Tensor

from tiny_models import VOCABULARY


def batches(
    count: int = 2, size: int = 3, tokens: int = 9, seed: int = 0, side: str = "right"
) -> list[dict[str, Tensor]]:
    """``count`` batches; the first sample of each fills its row, the others do not."""
    g = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        ids = torch.randint(3, VOCABULARY, (size, tokens), generator=g)
        ids[:, 2] = ids[:, 4]  # a token that comes twice, in prompt and answer
        mask, labels = torch.ones_like(ids), ids.clone()
        for b in range(size):
            length = tokens - b % 4
            mask[b, length:] = 0
            labels[b, : 2 + b % 2] = -100
            labels[b, length:] = -100
            ids[b, length:] = 0
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if side == "left":
            batch = {k: torch.stack([row.roll(b % 4) for b, row in enumerate(v)]) for k, v in batch.items()}
        made.append(batch)
    return made
