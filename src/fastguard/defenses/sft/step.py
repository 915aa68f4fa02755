"""Plain supervised fine-tuning on safe answers: what every defense is compared with, and what aligns a model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from fastguard.defenses.sft.options import Options
from fastguard.methods.passes import Batch, Loss
from fastguard.methods.training import Figures, Role, Step, Training


class SFT(Training):
    """Cross-entropy of refusals and retain samples, as one batch or as two.

    Args:
        model, loss, seed: see ``methods.training.Training``.
        retain_weight: None: ``harmless`` has all samples, and each answer token weighs the same. A number: ``harmless``
            has the refusals alone, and the loss of a batch ``retain`` is added with this weight.
    """

    def __init__(
        self, model: nn.Module, *, retain_weight: float | None = Options.retain_weight, loss: Loss | None = None,
        seed: int = 0,
    ) -> None:  # fmt: skip
        Options(retain_weight=retain_weight)
        super().__init__(model, loss=loss, seed=seed)
        self.retain_weight = retain_weight
        one: Mapping[str, Role] = {"harmless": Role("safe")}
        self.roles = one if retain_weight is None else {"harmless": Role("refusal"), "retain": Role("retain")}

    def gradient(self, step: Step, *, harmless: Batch, retain: Batch | None = None) -> Figures:  # type: ignore[override]
        """One step. Returns ``loss`` and, of two batches, ``harmless_ce`` and ``retain_ce``."""
        loss = step.loss(harmless)
        if retain is None or self.retain_weight is None:
            return {"loss": step.differentiate(loss, "")}
        keep = step.loss(retain)
        value = step.differentiate(loss + self.retain_weight * keep, "")
        return {"loss": value, "harmless_ce": loss.detach(), "retain_ce": keep.detach()}
