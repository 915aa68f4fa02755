"""Options of SN-Tune, as published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fastguard.settings import SettingError, Settings, number

PARTS = ("ffn", "value")
"""The neurons of MLPs, and the features of attention's values."""


@dataclass(frozen=True)
class Options(Settings):
    """See ``fastguard.defenses.sn_tune.step.SNTune``."""

    quick: ClassVar[Mapping[str, Any]] = {"threshold": 0.0, "most": 6, "samples": 4}

    threshold: float = number(1.0, at_least=0)  # that a neuron's least excitation has to reach
    most: int = number(100, at_least=1)  # neurons of a matrix, those with the highest
    parts: tuple[str, ...] = PARTS
    samples: int = number(200, at_least=1)  # that the neurons are found by

    def check(self) -> None:
        """Parts that there are."""
        if not self.parts or not set(self.parts) <= set(PARTS):
            raise SettingError("parts", self.parts, f"some of {', '.join(PARTS)}")
