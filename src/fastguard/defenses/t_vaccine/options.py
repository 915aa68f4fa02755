"""Options of T-Vaccine; defaults as published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fastguard.settings import Settings, choice, number

TRAINS = ("published", "drawn", "all")


@dataclass(frozen=True)
class Options(Settings):
    """See ``fastguard.TVaccine``."""

    quick: ClassVar[Mapping[str, Any]] = {"layers": 1, "every": 2, "probe_every": 2}

    rho: float = number(3.0, above=0)
    layers: int = number(8, at_least=1)  # perturbed at a time
    every: int = number(20, at_least=1)  # steps between draws of layers
    probe_every: int = number(200, at_least=1)  # steps between measurements of the layers' gradients
    trains: str = choice("published", *TRAINS)
    micro: int | None = number(None, at_least=1)  # samples at a time; None: batches pass whole

    def uncompilable(self, processes: int) -> str:
        """See `Settings.uncompilable`."""
        return "what perturbs activations inside of layers leaves nothing of them to compile"
