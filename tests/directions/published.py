"""Arditi et al.'s procedure in its plain form: hooks that clone in fp64, a sweep for each candidate, a filter after."""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def hooks(pre=(), post=()):
    handles = [m.register_forward_pre_hook(f) for m, f in pre] + [m.register_forward_hook(f) for m, f in post]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def mean_activations(model: nn.Module, batches: list[dict[str, Tensor]], positions: list[int]) -> Tensor:
    """[positions, layers, D] in fp64, of left-padded batches."""
    layers = model.model.layers
    number = sum(len(batch["input_ids"]) for batch in batches)
    sums = torch.zeros(len(positions), len(layers), model.config.hidden_size, dtype=torch.float64)

    def hook_of(layer: int):
        def hook(module, args):
            activation = args[0].clone().to(torch.float64)
            sums[:, layer] += (1.0 / number) * activation[:, positions].sum(0)

        return hook

    for batch in batches:
        with hooks([(layer, hook_of(i)) for i, layer in enumerate(layers)]):
            model(**batch)
    return sums


def without(direction: Tensor):
    unit = direction / direction.norm()

    def project(x: Tensor) -> Tensor:
        return x - (x @ unit.to(x))[..., None] * unit.to(x)

    def pre(module, args):
        return (project(args[0]), *args[1:])

    def post(module, args, output):
        return (project(output[0]), *output[1:]) if isinstance(output, tuple) else project(output)

    return pre, post


def ablation(model: nn.Module, direction: Tensor):
    """Three projections a layer, as published."""
    pre, post = without(direction)
    layers = model.model.layers
    return hooks(
        [(layer, pre) for layer in layers],
        [(layer.self_attn, post) for layer in layers] + [(layer.mlp, post) for layer in layers],
    )


def score(logits: Tensor, tokens: list[int]) -> Tensor:
    p = logits[:, -1].double().softmax(-1)[:, tokens].sum(-1)
    return torch.log(p + 1e-8) - torch.log(1 - p + 1e-8)


@torch.no_grad()
def selection(model, difference: Tensor, harmful, harmless, tokens: list[int]):
    """(position row, layer) and the three tables, of left-padded batches."""
    layers = model.model.layers
    positions, count = difference.shape[:2]
    refusal, kl, steering = (torch.full((positions, count), math.nan, dtype=torch.float64) for _ in range(3))
    base = [model(**batch).logits for batch in harmless]

    def mean(values: list[Tensor]) -> float:
        return float(torch.cat(values).mean())

    for p in range(positions):
        for layer in range(count):
            direction = difference[p, layer]
            with ablation(model, direction):
                found = []
                for batch, own in zip(harmless, base, strict=True):
                    a, b = own[:, -1].double().softmax(-1), model(**batch).logits[:, -1].double().softmax(-1)
                    found.append((a * (torch.log(a + 1e-6) - torch.log(b + 1e-6))).sum(-1))
                kl[p, layer] = mean(found)
                refusal[p, layer] = mean([score(model(**batch).logits, tokens) for batch in harmful])
            with hooks([(layers[layer], lambda module, args, d=direction: (args[0] + d.to(args[0]), *args[1:]))]):
                steering[p, layer] = mean([score(model(**batch).logits, tokens) for batch in harmless])
    best = None
    for p in range(positions):
        for layer in range(count):
            if layer >= int(count * (1.0 - 0.2)) or kl[p, layer] > 0.1 or steering[p, layer] < 0:
                continue
            if best is None or refusal[p, layer] < refusal[best]:
                best = (p, layer)
    return best, refusal, kl, steering
