"""Circuit breakers (Zou et al. 2024, arXiv 2406.04313) as a training step around ``CircuitBreakerLoss``.

One step: a batch of requests with harmful answers, and one of refusals and ordinary answers to retain. Published runs
train LoRA adapters of the layers up to the highest that is rerouted, 150 steps of 16 and 16 samples.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from fastguard.losses.circuit_breaker import CircuitBreakerLoss
from fastguard.methods.around import AroundLoss
from fastguard.methods.training import Role


class CircuitBreaker(AroundLoss):
    """Gradients of one step of circuit breakers.

    A step's figures are ``loss``, ``retain`` and ``rerouting``, and the ``retain_weight`` and ``rerouting_weight`` that
    they had.

    Args:
        model: see ``CircuitBreakerLoss``. seed: of the directions of the first step.
        changes: arguments of ``CircuitBreakerLoss``.
    """

    roles: ClassVar[dict[str, Role]] = {"harmful": Role("harmful"), "retain": Role("safe")}  # type: ignore[misc]

    def __init__(self, model: nn.Module, *, seed: int = 0, **changes: Any) -> None:
        options = {"check_finite": False, "over_ranks": True, **changes}
        super().__init__(model, CircuitBreakerLoss(model, seed=seed, **options), seed=seed)
