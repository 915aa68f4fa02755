"""Options of Vaccine; defaults as published."""

from __future__ import annotations

from dataclasses import dataclass

from fastguard.settings import Settings, number


@dataclass(frozen=True)
class Options(Settings):
    """See ``fastguard.Vaccine``."""

    rho: float = number(2.0, above=0)  # 2-norm of the perturbation
    micro: int | None = number(None, at_least=1)  # samples at a time; None: batches pass whole

    def uncompilable(self, processes: int) -> str:
        """See `Settings.uncompilable`."""
        return "what perturbs activations inside of layers leaves nothing of them to compile"
