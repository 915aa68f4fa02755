"""What of a loss's components goes into a log: numbers, the harmful loss first of all."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def figures_of(components: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """0-dim figures from the components of ``RepNoiseLoss``.

    ``harmful_ce`` is that of the model's output, ``lens_ce`` the mean over the hidden states that were read.
    """
    figures = {name: value for name, value in components.items() if value.dim() == 0}
    if "harmful_ce" in components:
        figures["harmful_ce"] = components["harmful_ce"][0]
        figures["lens_ce"] = components["harmful_ce"][1:].nanmean()
    return figures
