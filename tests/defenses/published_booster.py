"""Booster as its authors wrote it, in plain eager PyTorch: the step is added in place, and added back afterwards.

Independent of the package; the tests' oracle in float64, and a contender in benchmarks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]


def plain_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean next-token cross-entropy of what the attention mask keeps, or of the labels."""
    labels = (
        batch["labels"] if "labels" in batch else batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    )
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def gradient(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Of the plain loss, copied; none is left on the parameters."""
    model.zero_grad()
    plain_loss(model, batch).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def published_difference(
    model: nn.Module, harmful: Batch, alpha: float = 0.1, eps: float = 1e-7
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of the harmful batch at w and at w - alpha g / (||g|| + eps)."""
    first = gradient(model, harmful)
    norm = torch.norm(torch.stack([g.norm() for g in first.values()]))
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, g in first.items():
            parameters[name].data -= alpha * g / (norm + eps)
    second = gradient(model, harmful)
    with torch.no_grad():
        for name, g in first.items():
            parameters[name].data += alpha * g / (norm + eps)
    return first, second


def published_booster(
    model: nn.Module, harmful: Batch, harmless: Batch, alpha: float = 0.1, lam: float = 5.0, eps: float = 1e-7
) -> None:
    """Leaves g_align + lam (g_h - g_h') on the parameters."""
    first, second = published_difference(model, harmful, alpha, eps)
    aligned = gradient(model, harmless)
    for name, p in model.named_parameters():
        if name in aligned or name in first:
            p.grad = aligned.get(name, torch.zeros_like(p)) + lam * (first.get(name, 0) - second.get(name, 0))


def contender(model: nn.Module, options: Any, harmful: Batch, harmless: Batch) -> Callable[[], None]:
    """A step for the benchmarks, which clear the gradients before."""
    return lambda: published_booster(model, harmful, harmless, options.alpha, options.lam)
