"""Freezing of safety-critical weights as Wei et al. wrote it, in eager PyTorch: one sample at a time, topk, rewind.

Independent of the package; the tests' oracle in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from defenses.published_antidote import Batch, find_layers, sample_gradients


def snip(model: nn.Module, batches: list[Batch]) -> dict[str, Tensor]:
    """|W| times the sum over samples of |dL/dW|."""
    layers = find_layers(model)
    return {n: layers[n].weight.detach().abs() * g for n, g in sample_gradients(model, batches).items()}


def frozen_entries(
    model: nn.Module, safety: list[Batch], utility: list[Batch], q: float, p: float
) -> dict[str, set[int]]:
    """Of each matrix the flat indices of the top q by safety that are not of the top p by utility."""
    found = {}
    ours, theirs = snip(model, safety), snip(model, utility)
    for name, score in ours.items():
        top = set(torch.topk(score.flatten(), int(q * score.numel())).indices.tolist())
        found[name] = top - set(torch.topk(theirs[name].flatten(), int(p * score.numel())).indices.tolist())
    return found


def fine_tuned(
    model: nn.Module, entries: dict[str, set[int]], optimizer: torch.optim.Optimizer, loss: Callable[[int], Tensor],
    steps: int,
) -> None:  # fmt: skip
    """Training in which the entries are written back after every step."""
    layers = find_layers(model)
    before = {name: module.weight.detach().clone() for name, module in layers.items()}
    for n in range(steps):
        optimizer.zero_grad()
        loss(n).backward()
        optimizer.step()
        for name, chosen in entries.items():
            flat = layers[name].weight.data.view(-1)
            for i in chosen:
                flat[i] = before[name].view(-1)[i]
