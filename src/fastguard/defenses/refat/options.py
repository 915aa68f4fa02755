"""Options of ReFAT; defaults are the published ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fastguard.settings import SettingError, Settings, number


@dataclass(frozen=True)
class Options(Settings):
    """See ``fastguard.ReFATLoss``."""

    quick: ClassVar[Mapping[str, Any]] = {"every": 2}

    p: float = number(0.5, at_least=0, below=1)  # that a harmful sample runs ablated
    every: int = number(4, at_least=1)  # steps between estimations
    layers: tuple[int, ...] | None = number(None, at_least=0)  # that are ablated; None: all but the first quarter
    directions: int = number(1, at_least=1, at_most=64)  # a layer; more than the paper's one: see the loss
    samples: int = number(32, at_least=1)  # prompts' weight that earlier means have at most
    retain_weight: float = number(1.0, at_least=0)
    micro: int | None = number(None, at_least=1)  # samples at a time; None: batches pass whole

    def check(self) -> None:
        """Layers that are named once."""
        if self.layers is not None and not 0 < len(set(self.layers)) == len(self.layers):
            raise SettingError("layers", self.layers, "at least one index of a layer, each once")

    def describe(self) -> str:
        """See `Settings.describe`."""
        more = f", {self.directions} directions a layer" if self.directions > 1 else ""
        return f"ablation of {self.p:g} of the harmful samples{more}, estimated every {self.every} steps"
