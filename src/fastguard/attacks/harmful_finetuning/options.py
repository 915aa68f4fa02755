"""Options of harmful fine-tuning: none; learning rates, seeds and steps are the evaluation's."""

from __future__ import annotations

from dataclasses import dataclass

from fastguard.settings import Settings


@dataclass(frozen=True)
class Options(Settings):
    """See ``fastguard.attacks.harmful_finetuning.step.HarmfulFinetuning``."""
