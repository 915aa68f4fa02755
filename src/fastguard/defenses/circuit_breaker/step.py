"""Circuit breakers (Zou et al. 2024, arXiv 2406.04313) as a training step around ``CircuitBreakerLoss``.

One step: a batch of requests with harmful answers, and one of refusals and ordinary answers to retain. Published runs
train LoRA adapters of the layers up to the highest that is rerouted, 150 steps of 16 and 16 samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from fastguard.losses.circuit_breaker import CircuitBreakerLoss
from fastguard.methods.passes import Batch
from fastguard.methods.training import Figures, Role, Step, Training


class CircuitBreaker(Training):
    """Gradients of one step of circuit breakers.

    Args:
        model: see ``CircuitBreakerLoss``. seed: of the directions of the first step.
        changes: arguments of ``CircuitBreakerLoss``.
    """

    roles: ClassVar[dict[str, Role]] = {"harmful": Role("harmful"), "retain": Role("safe")}  # type: ignore[misc]

    def __init__(self, model: nn.Module, *, seed: int = 0, **changes: Any) -> None:
        super().__init__(model, seed=seed)
        options = {"structure": self.language.structure, "check_finite": False, **changes}
        self.loss_fn = CircuitBreakerLoss(model, seed=seed, **options)

    def gradient(self, step: Step, *, harmful: Batch, retain: Batch) -> Figures:  # type: ignore[override]
        """One step: ``harmful`` and ``retain`` as ``CircuitBreakerLoss`` takes them.

        Returns ``loss``, ``retain`` and ``rerouting``, and the ``retain_weight`` and ``rerouting_weight`` that they
        had. Errors as there.
        """
        loss = self.loss_fn(harmful=harmful, retain=retain, model=step.model)
        try:
            step.differentiate(loss, "both batches")
        except FloatingPointError:
            self.loss_fn.check_components()  # which state of this rank's it was
            raise
        return {name: value for name, value in self.loss_fn.components.items() if value.dim() == 0}

    def state_dict(self) -> dict[str, Any]:
        """See `Training.state_dict`: the counter of steps, and that of the schedule."""
        return {"step": self.step, "loss": {k: v.clone() for k, v in self.loss_fn.state_dict().items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Training.load_state_dict`."""
        super().load_state_dict(state)
        self.loss_fn.load_state_dict(state["loss"])

    def close(self) -> None:
        """See `Training.close`."""
        super().close()
        self.loss_fn.close()
