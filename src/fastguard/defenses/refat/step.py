"""Refusal-feature adversarial training (Yu et al. 2024, arXiv 2409.20089) as a training step around ``ReFATLoss``.

One step: harmful requests with refusals, of which some run with their refusal features ablated, and ordinary
instructions with answers, which never do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fastguard.losses.refat import ReFATLoss
from fastguard.methods.around import AroundLoss
from fastguard.methods.training import Role


class ReFAT(AroundLoss):
    """Gradients of one step of refusal-feature adversarial training.

    Args:
        model: see ``ReFATLoss``. seed: of the samples that are drawn. changes: arguments of ``ReFATLoss``.

    `evaluate` gives the plain cross-entropy of each batch, with nothing ablated.
    """

    roles: Mapping[str, Role] = {"refusal": Role("refusal"), "retain": Role("retain")}

    def __init__(self, model: nn.Module, *, seed: int = 0, **changes: Any) -> None:
        super().__init__(model, ReFATLoss(model, seed=seed, check_finite=False, over_ranks=True, **changes), seed=seed)
