"""Representation Noising (Rosati et al. 2024, arXiv 2405.14577) as a training step around ``RepNoiseLoss``.

One step: a batch of requests, each with a harmful answer and a refusal, and a batch of ordinary instructions to retain.
The published loss has no retain term; in runs short enough for a laptop it costs the model its usefulness without one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fastguard.losses.figures import evaluated, figures_of
from fastguard.losses.repnoise import RepNoiseLoss
from fastguard.methods.passes import Batch
from fastguard.methods.training import Figures, Role, Step, Training


class RepNoise(Training):
    """Gradients of one step of Representation Noising.

    Args:
        model: see ``RepNoiseLoss``. seed: of the noise and of the layers that are drawn.
        changes: arguments of ``RepNoiseLoss``.
    """

    roles: Mapping[str, Role] = {"pair": Role("pair"), "retain": Role("retain", optional=True)}

    def __init__(self, model: nn.Module, *, seed: int = 0, **changes: Any) -> None:
        self.loss_fn = RepNoiseLoss(model, seed=seed, **changes)
        super().__init__(model, loss=_no_plain_loss, seed=seed)

    def gradient(  # type: ignore[override]
        self, step: Step, *, harmful: Batch, harmless: Batch, retain: Batch | None = None
    ) -> Figures:
        """One step: ``harmful`` and ``harmless`` as ``RepNoiseLoss`` takes them, row by row of one prompt.

        Returns ``loss``, ``harmless_ce``, ``noise``, ``harmful_ce`` (of the output), ``lens_ce`` (the mean of the
        layers read) and ``retain_ce``. Errors as in ``RepNoiseLoss``.
        """
        loss = self.loss_fn(harmful=harmful, harmless=harmless, retain=retain, model=step.model)
        found = figures_of(self.loss_fn.components)
        return {**found, "loss": step.differentiate(loss, "")}

    def evaluate(self, batches: Mapping[str, Any], model: nn.Module | None = None) -> Figures:
        """See `Training.evaluate`: the loss and its components."""
        return evaluated(self.loss_fn, batches, self.model if model is None else model)

    def state_dict(self) -> dict[str, Any]:
        """See `Training.state_dict`: the counter of steps, and that of the noise."""
        return {"step": self.step, "loss": {k: v.clone() for k, v in self.loss_fn.state_dict().items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Training.load_state_dict`."""
        super().load_state_dict(state)
        self.loss_fn.load_state_dict(state["loss"])

    def close(self) -> None:
        """See `Training.close`."""
        self.loss_fn.close()


def _no_plain_loss(model: nn.Module, batch: Batch) -> Any:
    raise AssertionError("RepNoise has one loss, of a pair")
