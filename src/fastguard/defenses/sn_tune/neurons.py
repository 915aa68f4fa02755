"""How much the samples of some data excite each neuron of a model: what a layer would write less without it.

A neuron of an MLP is an input k of its last product; a value neuron is an output of attention's value map, which one
or, where heads share values, several inputs of the output map read. With x the activations of a sample's tokens and W
the map that reads them, the neuron adds the matrix x_k W_k^T to what the layer writes, of norm ||x_k|| ||W_k||.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastguard import machine
from fastguard.directions.neurons import last_products
from fastguard.directions.prompts import in_step, reading, sharded
from fastguard.ops.column_norms import column_norms_
from fastguard.ops.precision import accumulation_dtype
from fastguard.ops.segments import runs
from fastguard.ranks import tensor_parallel
from fastguard.saliency.places import clean
from fastguard.taps import Structure
from fastguard.taps.anchor import full

VALUE = ("v_proj", "value", "v")
"""What attention's value map is called."""

GATE = "gate"
"""In the name of an MLP's map that its activation function passes through: it is not trained, as published."""


@dataclass(frozen=True)
class Place:
    """The neurons of one matrix.

    Attributes:
        name: of it, for messages. reader: the linear map that reads them.
        rows, columns: weights, of which the neurons are the rows and the columns.
        count: of the neurons. head: how many of them a head has.
    """

    name: str
    reader: nn.Module
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    count: int
    head: int


def find_places(model: nn.Module, structure: Structure, parts: Sequence[str]) -> list[Place]:
    """The neurons of each layer. Raises ValueError that says what a layer lacks."""
    names = {id(p): clean(name) for name, p in structure.model.named_parameters()}
    found: list[Place] = []
    if "ffn" in parts:
        for layer, reader in enumerate(last_products(model, structure, structure.mlps)):
            size, mlp = _linear(reader, f"the MLP of layer {layer}").weight.shape[1], structure.mlps[layer]
            writers = {n: m for n, m in mlp.named_modules() if isinstance(m, nn.Linear) and m.weight.shape[0] == size}
            chosen = [m for n, m in writers.items() if GATE not in n and m is not reader]
            if not chosen:
                raise ValueError(f"model: expected a linear map in the MLP of layer {layer} that writes its neurons")
            rows = tuple(names[id(m.weight)] for m in chosen)
            found.append(Place(f"MLP {layer}", reader, rows, (names[id(reader.weight)],), size, size))
    if "value" in parts:
        if not structure.attentions:
            raise ValueError("model: expected an attention in each layer; without one, parts=('ffn',)")
        for layer, reader in enumerate(last_products(model, structure, structure.attentions)):
            attention = structure.attentions[layer]
            value = next((m for n, m in attention.named_modules() if n in VALUE), None)
            if not isinstance(value, nn.Linear):
                raise ValueError(
                    f"model: expected a linear map {' or '.join(VALUE)} in the attention of layer {layer}, "
                    f"got {type(value).__name__}; without one, parts=('ffn',)"
                )
            inputs, count = _linear(reader, f"the attention of layer {layer}").weight.shape[1], value.weight.shape[0]
            head = int(getattr(attention, "head_dim", count if inputs == count else 0))
            if not head or count % head or inputs % count:
                raise ValueError(
                    f"model: layer {layer}: {inputs} features of attention do not divide into {count} values"
                )
            found.append(Place(f"values {layer}", reader, (names[id(value.weight)],), (), count, head))
    return found


def _linear(module: Any, of: str) -> nn.Linear:
    if not isinstance(module, nn.Linear):
        raise ValueError(f"model: expected {of} to end in a torch.nn.Linear, got a {type(module).__name__}")
    return module


def least_excitation(
    model: nn.Module, structure: Structure, places: Sequence[Place], batches: Iterable[Mapping[str, Any]], name: str
) -> list[Tensor]:
    """The least excitation of each neuron by a sample: of each place [count].

    In evaluation mode, without gradients, over the tokens that are no padding; of all ranks' samples together. Where
    heads share values, a value's norm is the root of the squares over its heads.

    Raises ValueError where ``name`` has no batches, or the model is tensor-parallel; FloatingPointError that names a
    place that is not finite.
    """
    if tensor_parallel(model):
        raise ValueError("model: it is tensor-parallel; expected whole layers on each rank, whose neurons are read")
    least: list[Tensor | None] = [None] * len(places)
    rows: tuple[Tensor, Tensor | None] = runs(torch.ones(1, 1, dtype=torch.bool))
    counts = True
    device, counts = next(structure.model.parameters()).device, True

    def look(at: int, given: Tensor) -> None:
        place = places[at]
        bounds, index = rows
        wide = accumulation_dtype(given.dtype)
        x = given.reshape(-1, given.shape[-1])
        weight: Any = place.reader.weight
        norm = torch.linalg.vector_norm(full(weight), dim=0, dtype=wide)
        x = (x if index is None else x[index]).to(wide) * norm
        shared = x.shape[1] // place.count
        if shared > 1:  # [value heads, heads that share each, head] -> a row of all values for each sharing head
            heads = place.count // place.head
            x = x.view(-1, heads, shared, place.head).transpose(1, 2).reshape(-1, place.count)
            bounds = bounds * shared
        before = least[at]
        mine = torch.full((place.count,), torch.inf, dtype=wide, device=x.device) if before is None else before
        if counts:
            column_norms_(torch.zeros_like(mine), x, bounds=bounds, least=mine)
        least[at] = mine

    with contextlib.ExitStack() as stack:
        for at, place in enumerate(places):
            handle = place.reader.register_forward_pre_hook(lambda module, args, at=at: look(at, args[0]))
            stack.callback(handle.remove)
        run = stack.enter_context(reading(model, structure))
        stack.enter_context(torch.no_grad())
        for batch, own in in_step(batches, sharded(model) and machine.ranks() > 1, device, name):
            counts = own
            mask = batch.get("attention_mask")
            rows = runs(torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask != 0)
            run.run(batch)
    found: list[Tensor] = []
    for place, value in zip(places, least, strict=True):
        if value is None:
            raise ValueError(f"{name}: expected at least one batch, got none")
        if machine.ranks() > 1:
            torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MIN)
        if not bool(torch.isfinite(value).all()):
            raise FloatingPointError(f"{name}: the excitation of {place.name} is not finite")
        found.append(value.sqrt())
    return found


def strongest(values: Tensor, eligible: Tensor, most: int | None) -> Tensor:
    """The indices, ascending, of the ``most`` highest of the eligible values; of equal ones the first."""
    order = torch.sort(values.masked_fill(~eligible, -torch.inf), descending=True, stable=True).indices
    count = int(eligible.sum())
    return order[: count if most is None else min(most, count)].sort().values
