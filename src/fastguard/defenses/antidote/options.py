"""Options of Antidote; defaults of the published script."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fastguard.settings import Settings, choice, number


@dataclass(frozen=True)
class Options(Settings):
    """See ``fastguard.defenses.antidote.step.Antidote``."""

    quick: ClassVar[Mapping[str, Any]] = {"samples": 8}

    dense_ratio: float = number(0.1, above=0, at_most=1)  # of each output row; published tables have 0.01 to 0.25
    score: str = choice("wanda", "wanda", "snip", "magnitude")
    modules: tuple[str, ...] = ()  # parts of names; published without LoRA: q_proj, k_proj, v_proj. (): all linear maps
    samples: int = number(2000, at_least=1)  # harmful ones, at most
    tokens: str = choice("all", "all", "answer")  # that Wanda's norms are of
