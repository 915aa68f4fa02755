"""Options of Vaccine; defaults as published."""

from __future__ import annotations

from dataclasses import dataclass

from fastguard.settings import Settings, number


@dataclass(frozen=True)
class Options(Settings):
    """See ``fastguard.Vaccine``."""

    rho: float = number(2.0, above=0)  # 2-norm of the perturbation
