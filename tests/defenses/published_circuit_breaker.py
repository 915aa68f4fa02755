"""Circuit breakers (representation rerouting) as published, written eagerly: four forwards and stacks of all states.

An independent statement of the loss (Zou et al. 2024, arXiv 2406.04313) for tests and benchmarks; it shares no code
with fastguard. Both models end after layer max(layers) + 1: their last hidden state is that layer's output through the
final norm, and layers above have no part in anything. Norms are taken in fp32 there, here in the dtype of the states if
that is float64.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

Batch = Mapping[str, Tensor]
DIVISOR, ALPHA, LAYERS = 300, 10.0, (10, 20)


class Parts(NamedTuple):
    """Both terms before their weights."""

    retain: Tensor
    rerouting: Tensor


_TRUNCATED: WeakKeyDictionary[nn.Module, dict[int, nn.Module]] = WeakKeyDictionary()


def truncated(model: nn.Module, layers: Sequence[int]) -> nn.Module:
    """The model as it is with max(layers) + 1 for ``num_hidden_layers``, on the same parameters.

    One for each model: transformers hangs hooks on layers the first time that their states are asked for.
    """
    found = _TRUNCATED.setdefault(model, {})
    if max(layers) in found:
        return found[max(layers)]
    cut = found[max(layers)] = copy.copy(model)
    cut._modules = dict(model._modules)
    name, stack = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList))
    parent, _, last = name.rpartition(".")
    inner = copy.copy(model.get_submodule(parent))
    inner._modules = {**inner._modules, last: stack[: max(layers) + 1]}
    inner.config = copy.deepcopy(model.config)
    inner.config.num_hidden_layers = max(layers) + 1
    assert parent and "." not in parent
    cut._modules[parent] = inner
    return cut


def length(x: Tensor) -> Tensor:
    return torch.norm(x, dim=-1, p=2, dtype=None if x.dtype == torch.float64 else torch.float)


def published_circuit_breaker(
    model: nn.Module, frozen: nn.Module, harmful: Batch, retain: Batch, *, step: int, layers: Sequence[int] = LAYERS,
    alpha: float = ALPHA, divisor: int = DIVISOR,
) -> tuple[Tensor, Parts]:  # fmt: skip
    """The loss of training step ``step``, counted from 1, with its gradient, and its parts."""

    def states(of: nn.Module, batch: Batch) -> Tensor:
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        found = of(**inputs, output_hidden_states=True).hidden_states
        assert len(found) in (max(layers) + 1, max(layers) + 2)
        return torch.stack(found)

    live, before = truncated(model, layers), truncated(frozen, layers)
    with torch.no_grad():
        frozen_retain, frozen_harmful = states(before, retain), states(before, harmful)[list(layers)]
    progress = step / divisor
    mask = retain["attention_mask"][None, ..., None]
    kept = length(states(live, retain) * mask - frozen_retain * mask).nanmean()
    mask = harmful["attention_mask"].repeat(len(layers), 1, 1)
    turned = states(live, harmful)[list(layers)]
    units = (x / length(x)[..., None] for x in (turned, frozen_harmful))
    products = math.prod(units) * mask[..., None]
    similar = torch.relu(products.sum(-1)).sum() / mask.sum()
    return alpha * progress * kept + alpha * (1 - progress) * similar, Parts(kept, similar)
