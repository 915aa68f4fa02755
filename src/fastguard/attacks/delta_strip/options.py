"""Options of delta-strip: those of the ablation that follows, the base, and how much of the change is taken out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fastguard.attacks.refusal_ablation.options import Options as Ablation
from fastguard.settings import SettingError, number


@dataclass(frozen=True)
class Options(Ablation):
    """See ``fastguard.attacks.delta_strip.step.DeltaStrip``."""

    quick: ClassVar[Mapping[str, Any]] = {**Ablation.quick, "rounds": 1}
    models: ClassVar[tuple[str, ...]] = ("base",)

    base: str = "aligned"  # a folder, a Hugging Face id, `smollm2`, or in a run the name of one of its models
    rank: int = number(16, at_least=0)  # of a matrix's part that goes; public LoRA defenses have 16. 0: all of it

    def check(self) -> None:
        """A base that has a name."""
        if not self.base:
            raise SettingError("base", self.base, "a folder, a Hugging Face id, or the name of a model of the run")
