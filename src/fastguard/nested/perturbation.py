"""One step of the weights along a given direction, put back bit for bit, and how much of it the dtype kept.

Booster (Huang et al. 2024, arXiv 2409.01586) differentiates at w - a g / (||g|| + eps). Over billions of weights such a
step moves each by less than half of bf16's spacing and is rounded away. So every perturbation compares what it wrote
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

from fastguard.nested.guard import Restoring
from fastguard.nested.profile import span
from fastguard.nested.snapshot import Snapshot, Where
from fastguard.nested.weights import Weights
from fastguard.ops.multi_tensor import perturb_

WARN_BELOW = 0.95
REFUSE_BELOW = 0.7


class PerturbationLostError(RuntimeError):
    """The dtype rounded most of a perturbation away."""


@dataclass(frozen=True)
class Realised:
    """What became of a perturbation.

    Attributes:
        cosine: of the realised and the intended step. ratio: of their norms.
        dithered: each number stood elsewhere between two values of the dtype before (it is rounded from an fp32
            master). Rounding then keeps the step in the mean over the numbers, and adds noise across it: for a step of
            0.01 along SmolLM2's gradient, from masters, cosine 0.07 and ratio 15, and yet the difference of gradients
            between its ends is that of exact weights (cosine 0.98, length 1.05; tests/defenses/test_booster_bf16.py).
    """

    cosine: float
    ratio: float
    dithered: bool = False

    @property
    def kept(self) -> float:
        """The part of the intended step that is there: its coefficient in the realised one."""
        return self.cosine * self.ratio

    def __str__(self) -> str:
        return f"cosine {self.cosine:.3f}, norm ratio {self.ratio:.3f} to the intended step"

    @property
    def fidelity(self) -> float:
        """1 for the intended step, less the more it is off: by its cosine or length; dithered, by the part kept."""
        off = self.kept if self.dithered else self.ratio
        return min(off, 1 / off, 1.0 if self.dithered else self.cosine) if off > 0 else 0.0

    def judge(self, what: str, advice: str, allow_lost: bool, warn: bool = True) -> None:
        """Warn where the step is off by more than 5%; raise a PerturbationLostError where by more than 30%."""
        if not self.fidelity >= REFUSE_BELOW and not allow_lost:
            raise PerturbationLostError(
                f"{what}: the dtype rounded the step away ({self}). {advice}; allow_lost=True goes on all the same"
            )
        if not self.fidelity >= WARN_BELOW and warn:
            warnings.warn(f"{what}: {self}; part of the step was rounded away", RuntimeWarning, stacklevel=5)


def realised(sums: Sequence[float], dithered: bool = False) -> Realised:
    """From the sums that ``perturb_`` returns."""
    intended, done, inner = sums
    if not (intended > 0 and done > 0):
        return Realised(0.0, 0.0, dithered)
    return Realised(inner / math.sqrt(intended * done), math.sqrt(done / intended), dithered)


def directed(weights: Weights, directions: Sequence[Tensor | None]) -> tuple[Weights, list[Tensor], float]:
    """The parameters that have a direction, their directions, and the norm of these over all parameters and shards.

    Raises ValueError where there is not one entry a parameter, FloatingPointError where the norm is zero or not finite.
    """
    if len(directions) != len(weights):
        raise ValueError(f"directions: expected {len(weights)}, one a parameter, got {len(directions)}")
    given = [d for d in directions if d is not None]
    if not given:
        raise FloatingPointError("directions: no parameter has one; did the loss depend on any?")
    moved = weights.subset([i for i, d in enumerate(directions) if d is not None])
    length = float(moved.norm(given))
    if not (math.isfinite(length) and length > 0):
        raise FloatingPointError(f"directions: their norm is {length}; expected a finite number above 0")
    return moved, given, length


@contextlib.contextmanager
def perturbed(
    weights: Weights,
    directions: Sequence[Tensor | None],
    norm: float,
    *,
    eps: float = 1e-7,
    snapshot: Where = "device",
    through: torch.dtype | None = None,
    allow_lost: bool = False,
) -> Iterator[Realised]:
    """The model at w + norm * d / (||d|| + eps), ||d|| over all parameters and shards; as it was on leaving.

    Args:
        weights: what moves. directions: one local tensor a parameter, usually its gradient; None for one that stays.
            They are not needed any more once the block is entered.
        norm: length of the step; negative to go against the direction. eps: Booster's 1e-7.
        snapshot: where the original waits (``nested.Snapshot``). fp32 masters, one for each of ``weights``, keep a step
            that is far below the weights' own spacing in the mean over weights.
        through: dtype in which the forward sees the weights, where it is not their own (bf16 under FSDP2's mixed
            precision).
        allow_lost: go on where most of the step was rounded away.

    Yields what was realised. Gradients of the parameters are set aside meanwhile: inside they start from None, and what
    is to be kept of them is taken (``weights.take_gradients``).

    Warns where the realised step is off by more than 5%: its cosine or its length, or, from masters, the part of the
    intended step that is in it.

    Raises:
        PerturbationLostError: it is off by more than 30%. Use masters, LoRA in fp32, or ``nested.linearised``.
        FloatingPointError: the direction is zero or not finite.
        ValueError: masters that the weights are not the roundings of.
    """
    moved, given, length = directed(weights, directions)
    if not isinstance(snapshot, (str, int)):
        if len(snapshot) != len(weights):
            raise ValueError(f"snapshot: expected {len(weights)} masters, one a parameter, got {len(snapshot)}")
        snapshot = [m for m, d in zip(snapshot, directions, strict=True) if d is not None]
    masters = None if isinstance(snapshot, (str, int)) else snapshot
    tensors = moved.local()
    every = weights.among(None)
    original = Snapshot(tensors, snapshot)
    original.take()
    with Restoring() as guard:
        earlier = every.take_gradients()

        def restore(finished: bool) -> None:
            every.prepare()
            original.restore_()
            every.put_gradients(earlier)

        guard.on_exit(restore)
        step = _move(moved, tensors, given, norm / (length + eps), masters, through)
        guard.release()
        step.judge("perturbed", ADVICE, allow_lost)
        yield step


ADVICE = (
    "Perturb fp32 masters (snapshot=masters), train LoRA adapters in fp32, or compute the perturbed pass by "
    "nested.linearised"
)


def _move(
    weights: Weights,
    tensors: list[Tensor],
    directions: list[Tensor],
    scale: float,
    masters: Sequence[Tensor] | None,
    through: torch.dtype | None,
) -> Realised:
    """Write the step, and compare it with what was meant, over all shards."""
    total = torch.zeros(3, dtype=torch.float64)
    for at in weights.by_sharding():
        moved = [tensors[i] for i in at]
        with span("perturb", moved, 3):
            sums = perturb_(
                moved, [directions[i] for i in at], scale,
                source=None if masters is None else [masters[i] for i in at], through=through,
            )  # fmt: skip
            total += weights.reduce(sums, at[0]).double().cpu()
    torch.clear_autocast_cache()  # an enclosing autocast holds the weights, cast, for all forwards inside it
    rounds = masters is not None or (through is not None and any(t.dtype != through for t in tensors))
    return realised(total.tolist(), dithered=rounds)
