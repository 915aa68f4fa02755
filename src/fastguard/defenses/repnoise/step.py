"""Representation Noising (Rosati et al. 2024, arXiv 2405.14577) as a training step around ``RepNoiseLoss``.

One step: a batch of requests, each with a harmful answer and a refusal, and a batch of ordinary instructions to retain.
The published loss has no retain term; in runs short enough for a laptop it costs the model its usefulness without one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fastguard.losses.figures import evaluated
from fastguard.losses.repnoise import RepNoiseLoss
from fastguard.methods.around import AroundLoss
from fastguard.methods.passes import Batch
from fastguard.methods.training import Figures, Passes, Role, Step


class RepNoise(AroundLoss):
    """Gradients of one step of Representation Noising.

    A step's figures are ``loss``, ``harmless_ce``, ``noise``, ``harmful_ce`` (of the output), ``lens_ce`` (the mean of
    the layers read) and ``retain_ce``.

    Args:
        model: see ``RepNoiseLoss``. seed: of the noise and of the layers that are drawn.
        micro: harmless and retain samples that pass through the model at a time, at most, before the harmful half does
            undivided (``RepNoiseLoss.passes``); None: the pair as one batch, with the retain batch before one backward.
        changes: arguments of ``RepNoiseLoss``.
    """

    roles: Mapping[str, Role] = {"pair": Role("pair"), "retain": Role("retain", optional=True)}

    def __init__(self, model: nn.Module, *, micro: int | None = None, seed: int = 0, **changes: Any) -> None:
        super().__init__(
            model, RepNoiseLoss(model, seed=seed, over_ranks=True, **changes), loss=_no_plain_loss, seed=seed,
            micro=micro,
        )  # fmt: skip

    def losses(self, step: Step, **batches: Any) -> Tensor | Passes:
        """See `AroundLoss.losses`."""
        if self.micro is None:
            return super().losses(step, **batches)
        return [(run, 1.0) for run in self.loss_fn.passes(**batches, micro=self.micro, model=step.model)]  # type: ignore[attr-defined]

    def evaluate(self, batches: Mapping[str, Any], model: nn.Module | None = None) -> Figures:
        """See `Training.evaluate`: the loss of a pair and its components."""
        return evaluated(self.loss_fn, batches, self.model if model is None else model)


def _no_plain_loss(model: nn.Module, batch: Batch) -> Any:
    raise AssertionError("RepNoise has one loss, of a pair")
