"""Harmful fine-tuning as evaluation: how many steps until a model complies again?

The attacker trains all parameters on requests answered by compliance placeholders (an opening and the request
itself, never a method), as he would on harmful answers, and is scored on requests of other similarity clusters.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from fastguard.losses.answer import answer_loss
from fastguard.methods.passes import Batch
from fastguard.methods.training import Figures, Role, Step, Training


class HarmfulFinetuning(Training):
    """Cross-entropy of harmful answers, on all parameters that require a gradient."""

    roles: Mapping[str, Role] = {"harmful": Role("attack")}

    def __init__(self, model: nn.Module, *, seed: int = 0) -> None:
        super().__init__(model, loss=answer_loss, seed=seed)

    def gradient(self, step: Step, *, harmful: Batch) -> Figures:  # type: ignore[override]
        """One step. Returns ``loss``."""
        return {"loss": step.differentiate(step.loss(harmful), "")}
