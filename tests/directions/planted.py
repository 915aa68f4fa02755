"""A tiny Llama in which one planted direction is refusal, and prompts in which it is set or not."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tiny_models import VOCABULARY, tiny

REFUSAL = 40
"""The token with which it refuses."""
HARMFUL_FROM = 60
"""Tokens that carry the direction."""


def planted(layers: int = 5, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """The model in evaluation mode and the direction [D], of length 1.

    The embeddings of harmful tokens hold it, those of others do not; the head answers it with REFUSAL.
    """
    model = tiny("llama", dtype, num_hidden_layers=layers).eval()
    width = model.config.hidden_size
    direction = torch.randn(width, dtype=dtype, generator=torch.Generator().manual_seed(7))
    direction /= direction.norm()
    with torch.no_grad():
        for p in model.model.layers.parameters():
            if p.dim() > 1:
                p.mul_(0.3)
        embedding = model.model.embed_tokens.weight
        embedding -= (embedding @ direction)[:, None] * direction
        embedding[HARMFUL_FROM:] += 2.0 * direction
        head = model.lm_head.weight
        head -= (head @ direction)[:, None] * direction
        head[REFUSAL] += 1.5 * direction
        model.model.norm.weight.fill_(1.0)
    return model, direction


def prompts(
    harmful: bool, batches: int = 2, batch: int = 8, length: int = 9, seed: int = 0, padding: str | None = None
) -> list[dict[str, Tensor]]:
    """Batches of random prompts; padding: ``left`` or ``right`` of prompts of different lengths, same tokens."""
    g = torch.Generator().manual_seed(1000 * harmful + seed)
    low, high = (HARMFUL_FROM, VOCABULARY) if harmful else (3, REFUSAL)
    made = []
    for _ in range(batches):
        ids = torch.randint(low, high, (batch, length), generator=g)
        lengths = torch.randint(length - 3, length + 1, (batch,), generator=g)
        if padding is None:
            made.append({"input_ids": ids})
            continue
        mask = torch.arange(length) < lengths[:, None]
        ids = torch.where(mask, ids, 0)
        if padding == "left":
            by = (length - lengths).tolist()
            ids = torch.stack([row.roll(n) for row, n in zip(ids, by, strict=True)])
            mask = torch.stack([row.roll(n) for row, n in zip(mask, by, strict=True)])
        made.append({"input_ids": ids, "attention_mask": mask.long()})
    return made
