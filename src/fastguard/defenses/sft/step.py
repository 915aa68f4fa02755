"""Plain supervised fine-tuning on safe answers: what every defense is compared with, and what aligns a model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from fastguard.defenses.sft.options import Options
from fastguard.methods.passes import Batch, Loss
from fastguard.methods.training import Figures, Role, Step, Training, detached


class SFT(Training):
    """Cross-entropy of refusals and retain samples, as one batch or as two.

    Args:
        model, loss, seed, micro: see ``methods.training.Training``.
        retain_weight: None: ``harmless`` has all samples, and each answer token weighs the same. A number: ``harmless``
            has the refusals alone, and the loss of a batch ``retain`` is added with this weight.
    """

    def __init__(
        self, model: nn.Module, *, retain_weight: float | None = Options.retain_weight, loss: Loss | None = None,
        micro: int | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        Options(retain_weight=retain_weight)
        super().__init__(model, loss=loss, seed=seed, micro=micro)
        self.retain_weight = retain_weight
        one: Mapping[str, Role] = {"harmless": Role("safe")}
        self.roles = one if retain_weight is None else {"harmless": Role("refusal"), "retain": Role("retain")}

    def gradient(self, step: Step, *, harmless: Batch, retain: Batch | None = None) -> Figures:  # type: ignore[override]
        """One step. Returns ``loss`` and, of two batches, ``harmless_ce`` and ``retain_ce``."""
        if retain is None or self.retain_weight is None:
            return {"loss": step.differentiate(step.passes(step.loss, harmless), "")}
        if self.micro is None:  # one backward for both
            loss, keep = step.loss(harmless), step.loss(retain)
            step.differentiate(loss + self.retain_weight * keep, "")
        else:
            loss = step.differentiate(step.passes(step.loss, harmless), "harmless batch")
            keep = step.differentiate(step.passes(step.loss, retain), "retain batch", step.scale * self.retain_weight)
        return detached(loss=loss + self.retain_weight * keep, harmless_ce=loss, retain_ce=keep)
