"""Options of the ablation of refusal directions; numbers of prompts and filters as published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fastguard.settings import Settings, number


@dataclass(frozen=True)
class Options(Settings):
    """See ``fastguard.attacks.refusal_ablation.step.RefusalAblation``."""

    quick: ClassVar[Mapping[str, Any]] = {"rounds": 2, "positions": 1, "validation": 4, "estimation": 16}

    rounds: int = number(8, at_least=1)  # directions at most; public re-estimating attacks make 8
    positions: int = number(5, at_least=1)  # last tokens of the prompt that are candidates; published: 5 for Llama 3
    validation: int = number(32, at_least=1)  # prompts of each class that choose
    estimation: int = number(128, at_least=1)  # prompts of each class that estimate, at most; never those that choose
    max_kl: float = number(0.1, at_least=0)
    min_steering: float = number(0.0)
