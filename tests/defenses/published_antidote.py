"""Antidote as its authors wrote it, in plain eager PyTorch: Wanda's norms a sample at a time, the lowest scattered out.

Independent of the package; the tests' oracle in float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]


def find_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Linear maps of the layers: the LoRA factors if there are any."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in f".{n}"}
    factors = {n: m for n, m in found.items() if "lora_" in n}
    return factors or found


@torch.no_grad()
def norms(model: nn.Module, layers: dict[str, nn.Linear], batches: list[Batch]) -> dict[str, Tensor]:
    """Of each input feature the mean over sequences of its sum of squares over tokens, padding left out."""
    scaler = {name: torch.zeros(m.in_features, dtype=m.weight.dtype) for name, m in layers.items()}
    seen = 0
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            given: dict[str, Tensor] = {}
            handles = [
                m.register_forward_hook(lambda module, args, out, n=n: given.update({n: args[0]}))
                for n, m in layers.items()
            ]
            model(input_ids=ids[None, mask != 0])
            for handle in handles:
                handle.remove()
            for name, x in given.items():
                scaler[name] *= seen / (seen + 1)
                scaler[name] += x[0].T.norm(p=2, dim=1) ** 2 / (seen + 1)
            seen += 1
    return scaler


def published_antidote(model: nn.Module, batches: list[Batch], dense_ratio: float, **options: Any) -> None:
    """Prunes ``model`` in place. options: ``score``, ``gradients`` (name -> sum over samples of |dL/dW|)."""
    score = options.get("score", "wanda")
    layers = find_layers(model)
    scaler = norms(model, layers, batches) if score == "wanda" else {}
    for name, module in layers.items():
        weight = module.weight.data
        metric = weight.abs()
        if score == "wanda":
            metric = metric * scaler[name].sqrt()[None]
        elif score == "snip":
            metric = metric * options["gradients"][name]
        mask = torch.ones_like(metric)
        order = torch.sort(metric, dim=-1, stable=True).indices
        lowest = order[:, : int(metric.shape[1] * (1 - dense_ratio))]
        mask.scatter_(1, lowest, 0)
        weight.mul_(1 - mask)


def sample_gradients(model: nn.Module, batches: list[Batch]) -> dict[str, Tensor]:
    """Of each linear map of the layers the sum over samples of |dL/dW|, L the mean over a sample's answer tokens."""
    layers = find_layers(model)
    sums = {name: torch.zeros_like(m.weight) for name, m in layers.items()}
    for batch in batches:
        for ids, mask, labels in zip(*(batch[k] for k in ("input_ids", "attention_mask", "labels")), strict=True):
            keep = mask != 0
            logits = model(input_ids=ids[None, keep]).logits[0]
            loss = nn.functional.cross_entropy(logits[:-1], labels[keep][1:])
            grads = torch.autograd.grad(loss, [m.weight for m in layers.values()])
            for name, grad in zip(layers, grads, strict=True):
                sums[name] += grad.abs()
    return sums
