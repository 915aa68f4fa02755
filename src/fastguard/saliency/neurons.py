"""Fine-tuning of chosen rows and columns of weights alone, with gradients and optimizer state of nothing else.

    with neurons(model, rows={"model.layers.0.mlp.up_proj.weight": index}) as chosen:
        optimizer = torch.optim.AdamW(chosen.parameters(), lr=1e-5)
        loss.backward(); optimizer.step(); optimizer.zero_grad()

A neuron is a row of the maps that write it and a column of the map that reads it. What is trained is a small tensor of
its own beside each weight; a weight's gradient is cut to it where it arises and let go of, and what an optimizer made
of it is written into the weight after its step. Adam's two moments are then those of the neurons: 1% of the neurons,
1% of the state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastguard.ops.precision import accumulation_dtype
from fastguard.saliency.places import clean
from fastguard.taps.structure import unwrap

Index = Mapping[str, Tensor]


@contextlib.contextmanager
def neurons(model: nn.Module, rows: Index | None = None, columns: Index | None = None) -> Iterator[Neurons]:
    """Train those of ``model`` alone while the context lasts; see `Neurons`."""
    chosen = Neurons(model, rows, columns)
    try:
        yield chosen
    finally:
        chosen.close()


class Neurons:
    """Rows and columns of a model's weights as parameters of their own, in fp32 where the weights are narrower.

    Args:
        model: plain or PEFT, in one process (sharded weights are refused).
        rows: weight -> integers, the rows [K, I] that are trained. columns: weight -> integers, the columns [O, K].
            A weight has either.

    Raises ValueError that names a weight that the model has not, that is sharded, or is in both, or an index out of
    range or twice.
    """

    def __init__(self, model: nn.Module, rows: Index | None = None, columns: Index | None = None) -> None:
        base = unwrap(model)
        named = {clean(name): p for name, p in base.named_parameters()}
        self._asked = [(p, p.requires_grad) for p in base.parameters()]
        self._parts: dict[int, tuple[nn.Parameter, nn.Parameter, Tensor, int]] = {}
        self._handles: list[Any] = []
        parts: list[tuple[str, nn.Parameter, Tensor, int]] = []
        for key, given, dim in (("rows", rows or {}, 0), ("columns", columns or {}, 1)):
            for name, index in given.items():
                parts.append((name, _checked(key, name, index, named, dim), index, dim))
        if len({id(p) for _, p, _, _ in parts}) < len(parts):
            raise ValueError("columns: expected weights that are not among rows, and no tied one twice")
        if not parts:
            raise ValueError("rows: expected some neurons, got none")
        for p, _ in self._asked:
            p.requires_grad_(False)
        self.names: list[str] = []
        for name, weight, index, dim in parts:
            weight.requires_grad_(True)
            at = index.to(weight.device).long()
            part = nn.Parameter(weight.detach().index_select(dim, at).to(accumulation_dtype(weight.dtype)))
            self._parts[id(part)] = weight, part, at, dim
            self.names.append(name)

            def cut(p: Tensor, part: nn.Parameter = part, at: Tensor = at, dim: int = dim) -> None:
                assert p.grad is not None
                grad = p.grad.index_select(dim, at).to(part.dtype)
                part.grad = grad if part.grad is None else part.grad + grad
                p.grad = None

            self._handles.append(weight.register_post_accumulate_grad_hook(cut))
        self._handles.append(register_optimizer_step_post_hook(self._stepped))

    def parameters(self) -> list[nn.Parameter]:
        """What an optimizer is to be given."""
        return [part for _, part, _, _ in self._parts.values()]

    def _stepped(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for part in group["params"]:
                if id(part) in self._parts:
                    self._write(part)

    def write(self) -> None:
        """Write all parts into their weights: for optimizers that are not torch's, after each of their steps."""
        for part in self.parameters():
            self._write(part)

    @torch.no_grad()
    def _write(self, part: nn.Parameter) -> None:
        weight, _, at, dim = self._parts[id(part)]
        weight.index_copy_(dim, at, part.detach().to(weight.dtype))

    def close(self) -> None:
        """Take the hooks off; what is trained is again what was before."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for p, asked in self._asked:
            p.requires_grad_(asked)


def _checked(key: str, name: str, index: Tensor, named: Mapping[str, nn.Parameter], dim: int) -> nn.Parameter:
    if name not in named:
        raise ValueError(f"{key}: {name}: there is no such parameter in the model")
    weight = named[name]
    if hasattr(weight, "placements") or weight.dim() != 2:
        raise ValueError(f"{key}: {name}: expected a whole matrix, got {'a shard' if weight.dim() == 2 else 'none'}")
    size = weight.shape[dim]
    if index.dim() != 1 or not index.numel() or index.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{key}: {name}: expected integers [K], got {index.dtype} {tuple(index.shape)}")
    if int(index.min()) < 0 or int(index.max()) >= size or len(index.unique()) < len(index):
        raise ValueError(f"{key}: {name}: expected distinct integers from 0 to {size - 1}")
    return weight
