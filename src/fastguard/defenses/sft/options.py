"""Options of plain supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass

from fastguard.settings import Settings, number


@dataclass(frozen=True)
class Options(Settings):
    """See ``fastguard.defenses.sft.step.SFT``."""

    retain_weight: float | None = number(None, at_least=0)  # None: refusals and retain samples as one batch
    micro: int | None = number(None, at_least=1)  # samples at a time; None: batches pass whole
