"""What a loss refuses or warns of before it computes something that nobody asked for."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastguard.machine import ranks
from fastguard.taps import Structure

NARROW = (torch.bfloat16, torch.float16)
SAMPLE = 2**16
"""Weights that are watched, over all layers."""
KEPT = 0.25
"""Share of them that a step must change."""


def not_negative(**values: float) -> None:
    """Raise ValueError for the first that is not a finite number of at least 0."""
    for name, value in values.items():
        if not (isinstance(value, int | float) and math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}: expected a finite number >= 0, got {value!r}")


def a_batch(batch: Any, name: str) -> None:
    """Raise ValueError unless ``batch`` is a mapping of tensors."""
    if not isinstance(batch, Mapping):
        raise ValueError(f"{name}: expected a mapping with input_ids [B, T], got {type(batch).__name__}")


def chosen(
    loss: str, own: nn.Module, given: nn.Module | None, structure: Structure, differentiated: bool = True
) -> nn.Module:
    """The model to run: what a call was given, else the loss's own.

    Raises:
        ValueError: nothing was given where several ranks train and the loss's own model is not sharded itself: its
            gradients would stay each rank's, and the ranks drift apart.
        RuntimeError: a part of the model was replaced after the loss was constructed: the loss would read the old one.
    """
    trains = differentiated and torch.is_grad_enabled()
    if given is None and trains and ranks() > 1 and not any(hasattr(p, "device_mesh") for p in own.parameters()):
        raise ValueError(
            f"{loss}: model: expected the model as DDP, FSDP or accelerate have wrapped it, got none on "
            f"{ranks()} ranks, whose gradients would not be reduced; where that is meant, give the bare model"
        )
    if not torch.compiler.is_compiling():
        _still_there(loss, structure)
    return own if given is None else given


def _still_there(loss: str, structure: Structure) -> None:
    modules = set(map(id, structure.model.modules()))
    parts = {"head": [structure.head], "final norm": [structure.norm], "layers": structure.layers}
    for name, found in parts.items():
        if any(id(part) not in modules for part in found):
            raise RuntimeError(
                f"{loss}: the model's {name} was replaced after the loss was constructed, which would read the "
                "old one; construct the loss anew, after the change"
            )
    head: Any = structure.head
    if isinstance(head.weight, Tensor) and head.weight.shape[0] != structure.vocabulary:
        raise RuntimeError(
            f"{loss}: the model's head has {head.weight.shape[0]} rows, and had {structure.vocabulary} when the loss "
            "was constructed; construct the loss anew, after resize_token_embeddings"
        )


class RoundedAway:
    """Watches whether an optimizer's steps survive in narrow weights, and warns once where most are rounded away.

    Looks at a sample of the layers' trainable bf16 and fp16 weights whenever a call of the loss comes after a step,
    until one has been judged. It costs fp32 models nothing, others a copy and a comparison of `SAMPLE` numbers a call.
    """

    def __init__(self, loss: str, structure: Structure) -> None:
        self._loss, self._structure = loss, structure
        self._before: Tensor | None = None
        self._done = False

    def look(self) -> None:
        """Call once a training call of the loss, before its forward."""
        if self._done or torch.compiler.is_compiling():
            return
        now = self._sample()
        if now is None:
            self._done = True
            return
        if self._before is None or self._before.shape != now.shape:
            self._before = now
            return
        changed = float((now != self._before).float().mean())
        if changed == 0:  # no step in between: gradients are being accumulated
            return
        self._done, self._before = True, None
        if changed < KEPT:
            warnings.warn(
                f"{self._loss}: the last optimizer step changed {changed:.1%} of the weights: {now.dtype} rounds the "
                "rest of it away. Keep fp32 weights (from_pretrained(..., dtype=torch.float32), with bf16 autocast if "
                "the products are to be fast), or train LoRA adapters in fp32",
                stacklevel=4,
            )

    def _sample(self) -> Tensor | None:
        found = {id(p): p for layer in self._structure.layers for p in layer.parameters()}
        narrow = [p for p in found.values() if p.requires_grad and p.dtype in NARROW and p.dim() > 1]
        if not narrow:
            return None
        each = max(SAMPLE // len(narrow), 1)
        local = [p.to_local() if hasattr(p, "to_local") else p for p in (q.detach() for q in narrow)]
        pieces = [p.flatten()[:: max(p.numel() // each, 1)][:each] for p in local if p.numel()]
        return torch.cat(pieces).clone() if pieces else None
