"""An attacker on weights in bf16 or fp16: how much of its steps the dtype keeps, and masters that keep all of them.

A step of AdamW moves a weight by about its learning rate. 2e-5 is a sixth of the spacing of bf16 at 0.02 and mostly
rounded away, and what is lost in one step is lost again in the next: the attack is then far weaker than the same
attack on fp32 weights, and so is a defense against it. Either that is measured (`Sampled`), or the attacker works on
fp32 copies of which the weights are the roundings (`Mastered`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastguard.nested.guard import derived_seed, summed_over_ranks
from fastguard.nested.optimizers import Optimizer, Running, resumable
from fastguard.nested.perturbation import Realised, realised
from fastguard.nested.profile import span

NARROW = (torch.bfloat16, torch.float16)

SAMPLE = 2**18
"""Numbers that are followed: 1 MB each of start, fp32 copy and moments, whatever the size of the model."""

FOLLOWED = 8
"""Steps of an attack that are followed at most."""

PIECE = 2**24
"""Elements that are dithered at a time."""

ADVICE = "Let the attacker keep fp32 masters (masters='fp32'), or train fp32 weights or LoRA adapters in fp32"


def narrow(tensors: Sequence[Tensor]) -> list[int]:
    """Indices of the tensors whose dtype may round a step away; the same on every rank."""
    return [i for i, t in enumerate(tensors) if t.dtype in NARROW]


class Sampled:
    """The attacker's optimizer on ``tensors``, and once more in fp32 on a sample of their numbers, for comparison.

    The sample gets the same gradients, so that it shows the steps that were meant; hence ``rule`` must be elementwise.
    """

    def __init__(self, rule: Optimizer, tensors: Sequence[Tensor]) -> None:
        self._tensors, self._running = tensors, rule.start(tensors)
        self._narrow = narrow(tensors)
        self._stride = sum(tensors[i].numel() for i in self._narrow) // SAMPLE | 1  # odd: not one column of a matrix
        self._start = [self._pick(tensors[i]).float() for i in self._narrow]
        self._meant = [s.clone() for s in self._start]
        self._shadow: Running | None = rule.start(self._meant)
        self._steps = 0

    def _pick(self, t: Tensor) -> Tensor:
        return t.reshape(-1)[:: self._stride]

    def step(self, gradients: Sequence[Tensor | None]) -> None:
        """See `Running.step`."""
        if self._shadow is not None:
            given = [gradients[i] for i in self._narrow]
            self._shadow.step([None if g is None else self._pick(g).contiguous() for g in given])
            self._steps += 1
        self._running.step(gradients)

    @torch.no_grad()
    def measure(self) -> Realised | None:
        """What became of all steps so far, over all ranks; called by all of them, waits for the device.

        None where it is not followed any more, where no step was meant, and where one was not finite.
        """
        if self._shadow is None or self._steps == 0:
            return None
        meant = torch.cat([m - s for m, s in zip(self._meant, self._start, strict=True)])
        done = torch.cat([self._pick(self._tensors[i]) - s for i, s in zip(self._narrow, self._start, strict=True)])
        sums = summed_over_ranks(torch.stack([meant.square().sum(), done.square().sum(), (meant * done).sum()]))
        values = sums.tolist()
        if self._steps >= FOLLOWED:
            self._shadow = None
            self._start, self._meant = [], []
        return realised(values) if 0 < values[0] < float("inf") and values[1] < float("inf") else None


class Mastered:
    """The attacker's optimizer on fp32 masters of ``tensors``, which are rounded from them after every step.

    Args:
        masters: the defender's own, one a tensor, to start from. None: numbers drawn evenly from all those that round
            to the weights, as a function of ``seed``. Weights that are themselves the masters would stay where they are
            until a drift reaches half their spacing; drawn ones move in the mean from the first step on.
        seed: equal on all ranks, as replicas must start alike.
    """

    def __init__(self, rule: Optimizer, tensors: Sequence[Tensor], masters: Sequence[Tensor] | None, seed: int) -> None:
        at = narrow(tensors)
        self._given, self._seed = masters, seed
        self.tensors = [self.start_of(i, t) for i, t in enumerate(tensors)]
        self._weights, self._masters = [tensors[i] for i in at], [self.tensors[i] for i in at]
        self._running = rule.start(self.tensors)

    def start_of(self, i: int, weight: Tensor) -> Tensor:
        """Where the attacker's i-th begins: the master of an original weight in bf16 or fp16, else the weight."""
        if weight.dtype not in NARROW:
            return weight
        if self._given is None:
            return dithered(weight, derived_seed("masters", self._seed, i))
        return self._given[i].detach().to(weight.device, torch.float32, copy=True)

    def step(self, gradients: Sequence[Tensor | None]) -> None:
        """See `Running.step`."""
        self._running.step(gradients)
        self.round_()

    def state(self) -> list[dict[str, Any]]:
        """See `Resumable.state`."""
        return resumable(self._running).state()

    def resume(self, state: Sequence[dict[str, Any]]) -> None:
        """See `Resumable.resume`; the masters are as they were given."""
        resumable(self._running).resume(state)

    @torch.no_grad()
    def round_(self) -> None:
        """Make the weights what the masters round to."""
        with span("weights from masters", [*self._weights, *self._masters], 1):
            torch._foreach_copy_(self._weights, self._masters)


@torch.no_grad()
def dithered(t: Tensor, seed: int) -> Tensor:
    """fp32 numbers of the shape of ``t`` (bf16 or fp16) that round to it, evenly distributed over all that do; 0 stays.

    A drift that is added to them then moves the rounded numbers by as much in the mean.
    """
    generator = torch.Generator(t.device).manual_seed(seed)
    found = torch.empty(t.shape, dtype=torch.float32, device=t.device)
    for piece, out in zip(t.reshape(-1).split(PIECE), found.view(-1).split(PIECE), strict=True):
        size = piece.float().abs()
        bits = piece.contiguous().view(torch.int16)  # sign and magnitude: one more is one spacing away from zero
        outwards = (bits + 1).view(t.dtype).float().abs() - size
        inwards = size - (bits - 1).view(t.dtype).float().abs()
        place = (torch.rand(size.shape, generator=generator, device=t.device) - 0.5) * 0.998  # never a tie
        shift = place * torch.where((place > 0) & outwards.isfinite(), outwards, inwards)
        out.copy_(torch.where(piece == 0, piece.float(), (size + shift).copysign(piece.float())))
    return found
