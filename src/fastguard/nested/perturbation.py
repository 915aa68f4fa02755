"""One step of the weights along a given direction, put back bit for bit, and how much of it the dtype kept.

Booster (Huang et al. 2024, arXiv 2409.01586) differentiates at w + a g / (||g|| + eps). Over billions of weights such
a step moves each by less than half of bf16's spacing and is rounded away. So every perturbation compares what it
wrote
with what was meant: the cosine of the two, and the ratio of their norms.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastguard.nested.guard import Interrupts
from fastguard.nested.snapshot import Snapshot, Where
from fastguard.nested.weights import Weights
from fastguard.ops.multi_tensor import perturb_

WARN_BELOW = 0.95
REFUSE_BELOW = 0.7


class PerturbationLostError(RuntimeError):
    """The dtype rounded most of a perturbation away."""


@dataclass(frozen=True)
class Realised:
    """What became of a perturbation: cosine of the realised and the intended step, ratio of their norms."""

    cosine: float
    ratio: float

    def __str__(self) -> str:
        return f"cosine {self.cosine:.3f}, norm ratio {self.ratio:.3f} to the intended step"


@contextlib.contextmanager
def perturbed(
    weights: Weights,
    directions: Sequence[Tensor],
    norm: float,
    *,
    eps: float = 1e-7,
    snapshot: Where = "device",
    through: torch.dtype | None = None,
    allow_lost: bool = False,
) -> Iterator[Realised]:
    """The model at w + norm * d / (||d|| + eps), ||d|| over all parameters and shards; as it was on leaving.

    Args:
        weights: what moves. directions: one local tensor a parameter, usually its gradient.
        norm: length of the step. eps: Booster's 1e-7.
        snapshot: where the original waits (``nested.Snapshot``). fp32 masters keep a step that is far below the
            weights' own spacing in the mean over weights, since each master stands elsewhere between two bf16 values.
        through: dtype in which the forward sees the weights, where it is not their own (bf16 under FSDP2's mixed
            precision).
        allow_lost: go on where most of the step was rounded away.

    Yields what was realised. Warns where its cosine or ratio is off by more than 5%. Gradients of the parameters are
    set
    aside meanwhile: inside they start from None, and what is to be kept of them is taken (``weights.take_gradients``).

    Raises:
        PerturbationLostError: the cosine is below 0.7, or the ratio not within 0.7 and 1 / 0.7. Use masters, LoRA in
            fp32, or ``nested.linearised``.
        FloatingPointError: the direction is zero or not finite.
    """
    length = weights.norm(directions)
    if not (math.isfinite(value := float(length)) and value > 0):
        raise FloatingPointError(f"perturbed: the direction has norm {value}; expected a finite number above 0")
    tensors = weights.local()
    every = Weights(weights.model)
    earlier = every.take_gradients()
    original = Snapshot(tensors, snapshot)
    masters = None if isinstance(snapshot, (str, int)) else list(snapshot)
    with Interrupts() as interrupts:
        original.take()
        try:
            realised = _move(weights, tensors, directions, norm / (length + eps), masters, through)
            _judge(realised, allow_lost)
            yield realised
        finally:
            try:
                interrupts.hold()
            finally:
                weights.prepare()
                original.restore_()
                every.put_gradients(earlier)


def _move(
    weights: Weights,
    tensors: list[Tensor],
    directions: Sequence[Tensor],
    scale: Tensor,
    masters: list[Tensor] | None,
    through: torch.dtype | None,
) -> Realised:
    weights.prepare()
    total: Tensor | None = None
    for at in weights.by_sharding():
        sums = perturb_(
            [tensors[i] for i in at], [directions[i] for i in at], scale,
            source=None if masters is None else [masters[i] for i in at], through=through,
        )  # fmt: skip
        part = weights.reduce(sums, at[0]).double()
        total = part if total is None else total + part
    assert total is not None  # Weights is never empty
    intended, realised, inner = total.tolist()
    cosine = inner / math.sqrt(intended * realised) if realised > 0 else 0.0
    return Realised(cosine, math.sqrt(realised / intended) if intended > 0 else 0.0)


def _judge(realised: Realised, allow_lost: bool) -> None:
    kept = min(realised.cosine, realised.ratio, 1 / realised.ratio if realised.ratio > 0 else 0.0)
    if kept < REFUSE_BELOW and not allow_lost:
        raise PerturbationLostError(
            f"perturbed: the weights' dtype rounded the step away ({realised}). Perturb fp32 masters "
            "(snapshot=masters), train LoRA adapters in fp32, or use nested.linearised; allow_lost=True goes on "
            "all the same"
        )
    if kept < WARN_BELOW:
        warnings.warn(f"perturbed: {realised}; part of the step was rounded away", RuntimeWarning, stacklevel=4)
