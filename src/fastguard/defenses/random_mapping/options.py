"""Options of Random Mapping; defaults as published."""

from __future__ import annotations

from dataclasses import dataclass

from fastguard.settings import Settings, number


@dataclass(frozen=True)
class Options(Settings):
    """See ``fastguard.RandomMapping``."""

    mapping_weight: float = number(1.0, at_least=0)
    retain_weight: float = number(1.0, at_least=0)
    mask_padding: bool = False  # published: padding counts
    micro: int | None = number(None, at_least=1)  # samples at a time; None: batches pass whole
