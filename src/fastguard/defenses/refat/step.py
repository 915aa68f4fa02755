"""Refusal-feature adversarial training (Yu et al. 2024, arXiv 2409.20089) as a training step around ``ReFATLoss``.

One step: harmful requests with refusals, of which some run with their refusal features ablated, and ordinary
instructions with answers, which never do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fastguard.losses.refat import ReFATLoss
from fastguard.methods.around import AroundLoss
from fastguard.methods.training import Passes, Role, Step


class ReFAT(AroundLoss):
    """Gradients of one step of refusal-feature adversarial training.

    Args:
        model: see ``ReFATLoss``. seed: of the samples that are drawn. changes: arguments of ``ReFATLoss``.
        micro: samples that pass through the model at a time, at most (``ReFATLoss.passes``); None: batches pass whole,
            with one backward for both.

    `evaluate` gives the plain cross-entropy of each batch, with nothing ablated.
    """

    roles: Mapping[str, Role] = {"refusal": Role("refusal"), "retain": Role("retain")}

    def __init__(self, model: nn.Module, *, micro: int | None = None, seed: int = 0, **changes: Any) -> None:
        loss_fn = ReFATLoss(model, seed=seed, check_finite=False, over_ranks=True, **changes)
        super().__init__(model, loss_fn, seed=seed, micro=micro)

    def losses(self, step: Step, **batches: Any) -> Tensor | Passes:
        """See `AroundLoss.losses`."""
        if self.micro is None:
            return super().losses(step, **batches)
        return [(run, 1.0) for run in self.loss_fn.passes(**batches, micro=self.micro, model=step.model)]  # type: ignore[attr-defined]
