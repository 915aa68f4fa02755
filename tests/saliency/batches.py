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
            prompt, length = 2 + b % 2, tokens - b % 4
            kept = torch.arange(tokens) < length if side == "right" else torch.arange(tokens) >= tokens - length
            start = 0 if side == "right" else tokens - length
            mask[b] = kept
            labels[b, : start + prompt] = -100
            labels[b, ~kept] = -100
            ids[b, ~kept] = 0
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made
