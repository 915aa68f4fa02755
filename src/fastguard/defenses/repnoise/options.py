"""Options of Representation Noising; defaults as published, quirks included."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fastguard.settings import Settings, choice, number

BOUNDARIES = ("constant", "predicted")


@dataclass(frozen=True)
class Options(Settings):
    """See ``fastguard.RepNoiseLoss``."""

    timed: ClassVar[Mapping[str, Any]] = {"retain_weight": 1.0}  # with the retain batch that runs have

    alpha: float = number(1.0, at_least=0)  # ascent on the harmful loss of output and layers
    beta: float = number(0.001, at_least=0)  # noise asked of the MLP outputs
    layers: int | None = number(None, at_least=1)  # lens layers sampled per step; None: all
    mask_padding: bool = False
    boundary: str = choice("constant", *BOUNDARIES)  # constant: the first differing token gives no gradient
    output_alpha: float = number(0.0, at_least=0)  # ascent on the output's harmful loss alone
    retain_weight: float = number(1.0, at_least=0)  # of the retain batch, which the published loss does not have
    micro: int | None = number(None, at_least=1)  # harmless and retain samples at a time; None: all as one batch

    def uncompilable(self, processes: int) -> str:
        """See `Settings.uncompilable`."""
        return "" if processes == 1 else "its noise term gathers the samples of all processes inside of layers"
