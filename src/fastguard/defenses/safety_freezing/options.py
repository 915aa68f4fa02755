"""Options of the freezing of safety-critical weights; shares as in the published README's example."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fastguard.settings import Settings, choice, number


@dataclass(frozen=True)
class Options(Settings):
    """See ``fastguard.defenses.safety_freezing.step.SafetyFreezing``."""

    quick: ClassVar[Mapping[str, Any]] = {"samples": 8}

    safety_top: float = number(0.1, above=0, at_most=1)  # q: of each matrix, by its score on refusals
    utility_top: float = number(0.1, at_least=0, at_most=1)  # p: of each matrix, by its score on ordinary answers
    score: str = choice("snip", "snip", "wanda")
    modules: tuple[str, ...] = ()  # parts of names; (): all linear maps of the layers
    samples: int = number(128, at_least=1)  # of either kind, at most
