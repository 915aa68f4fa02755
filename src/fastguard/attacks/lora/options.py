"""Options of the LoRA attacker."""

from __future__ import annotations

from dataclasses import dataclass

from fastguard.settings import Settings, number


@dataclass(frozen=True)
class Options(Settings):
    """See ``fastguard.attacks.lora.step.LoRA``."""

    rank: int = number(8, at_least=1)
    alpha: float = number(16.0, above=0)
    dropout: float = number(0.0, at_least=0, below=1)
