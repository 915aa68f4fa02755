"""Options of Booster; defaults as published."""

from __future__ import annotations

from dataclasses import dataclass

from fastguard.settings import Settings, choice, number

MODES = ("weights", "linearised")


@dataclass(frozen=True)
class Options(Settings):
    """See ``fastguard.Booster``."""

    alpha: float = number(0.1, above=0)  # length of the harmful step
    lam: float = number(5.0, at_least=0)
    mode: str = choice("weights", *MODES)  # linearised: no weight is written, right in bfloat16
    micro: int | None = number(None, at_least=1)  # samples at a time; None: batches pass whole
