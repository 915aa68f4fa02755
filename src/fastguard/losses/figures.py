"""What of a loss's components goes into a log: numbers, the harmful loss first of all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

NAMES = {"harmful_ce_output": "harmful_ce", "harmful_ce_lens": "lens_ce"}


def figures_of(components: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """0-dim figures from the components of a loss.

    Of ``RepNoiseLoss``, ``harmful_ce`` is that of the model's output, ``lens_ce`` the mean over the hidden states that
    were read.
    """
    return {NAMES.get(name, name): value for name, value in components.items() if value.dim() == 0}


def evaluated(loss_fn: Any, batches: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The figures and the ``loss`` of held-out batches, without gradients; nothing of the training moves."""
    with torch.no_grad():
        loss = loss_fn(**batches, model=model)
    return {**figures_of(loss_fn.evaluation), "loss": loss}
