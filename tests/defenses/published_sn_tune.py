"""SN-Tune and RSN-Tune written out: each neuron taken away in turn, each sample alone, sets of indices.

Independent of the package; the tests' oracle in float64, for Llama.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]
Neurons = dict[str, set[int]]
"""``ffn 0``, ``value 0`` and so on, and the neurons of that layer."""


@torch.no_grad()
def inputs_of(model: nn.Module, batch: Batch) -> list[dict[str, Tensor]]:
    """Of each sample, without its padding, what the output maps of MLP and attention read in each layer [T, I]."""
    found = []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        given: dict[str, Tensor] = {}
        handles = []
        for i, layer in enumerate(model.model.layers):
            for name, module in ((f"ffn {i}", layer.mlp.down_proj), (f"value {i}", layer.self_attn.o_proj)):
                handles.append(
                    module.register_forward_hook(lambda m, args, out, name=name: given.update({name: args[0][0]}))
                )
        model(input_ids=ids[None, mask != 0])
        for handle in handles:
            handle.remove()
        found.append(given)
    return found


def without(x: Tensor, weight: Tensor, columns: list[int]) -> float:
    """How much the product changes without a neuron: the root of the squares over the columns that read it."""
    total = 0.0
    for c in columns:
        less = x.clone()
        less[:, c] = 0
        total += float((x @ weight.T - less @ weight.T).square().sum())
    return math.sqrt(total)


def least(model: nn.Module, batches: list[Batch]) -> dict[str, list[float]]:
    """The least change by any sample, of each neuron."""
    config, found = model.config, dict[str, list[float]]()
    head = config.hidden_size // config.num_attention_heads
    shared = config.num_attention_heads // config.num_key_value_heads
    for batch in batches:
        for given in inputs_of(model, batch):
            for i, layer in enumerate(model.model.layers):
                mlp, attention = layer.mlp.down_proj.weight.detach(), layer.self_attn.o_proj.weight.detach()
                here = {
                    f"ffn {i}": [without(given[f"ffn {i}"], mlp, [k]) for k in range(mlp.shape[1])],
                    f"value {i}": [
                        without(
                            given[f"value {i}"], attention,
                            [(k // head * shared + r) * head + k % head for r in range(shared)],
                        )
                        for k in range(config.num_key_value_heads * head)
                    ],
                }  # fmt: skip
                for name, values in here.items():
                    found[name] = list(map(min, values, found.get(name, values)))
    return found


def highest(values: list[float], eligible: set[int], most: int | None) -> set[int]:
    return set(sorted(eligible, key=lambda k: (-values[k], k))[:most])


def safety_neurons(safety: Mapping[str, list[float]], threshold: float, most: int) -> Neurons:
    return {
        name: highest(values, {k for k, v in enumerate(values) if v >= threshold}, most)
        for name, values in safety.items()
    }


def robust_neurons(
    safety: Mapping[str, list[float]], foundation: Mapping[str, list[float]], threshold: float, most: int,
    foundation_most: int | None,
) -> Neurons:  # fmt: skip
    found = {}
    for name, values in safety.items():
        general = highest(
            foundation[name], {k for k, v in enumerate(foundation[name]) if v >= threshold}, foundation_most
        )
        found[name] = highest(values, {k for k, v in enumerate(values) if v >= threshold} - general, most)
    return found


def tuned(
    model: nn.Module, neurons: Neurons, optimizer: torch.optim.Optimizer, loss: Callable[[int], Tensor], steps: int
) -> None:
    """Training with masks of the rows of up and value maps and of the columns of down maps; all other gradients 0."""
    masks = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for i in range(len(model.model.layers)):
        for k in neurons[f"ffn {i}"]:
            masks[f"model.layers.{i}.mlp.up_proj.weight"][k] = 1
            masks[f"model.layers.{i}.mlp.down_proj.weight"][:, k] = 1
        for k in neurons[f"value {i}"]:
            masks[f"model.layers.{i}.self_attn.v_proj.weight"][k] = 1
    for n in range(steps):
        optimizer.zero_grad()
        loss(n).backward()
        for name, p in model.named_parameters():
            p.grad *= masks[name]
        optimizer.step()
