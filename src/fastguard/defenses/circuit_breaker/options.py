"""Options of circuit breakers; defaults as published."""

from __future__ import annotations

from dataclasses import dataclass

from fastguard.settings import SettingError, Settings, choice, number

POSITIONS = ("attended", "labels")
RETAIN_STATES = ("truncated", "all")
RETAIN_DISTANCES = ("absolute", "relative")


@dataclass(frozen=True)
class Options(Settings):
    """See ``fastguard.CircuitBreakerLoss``."""

    alpha: float = number(10.0, at_least=0)  # of both terms
    layers: tuple[int, ...] | None = number(None, at_least=0)  # hidden states; None: 10 and 20 of 32, scaled
    schedule: int = number(300, at_least=1)  # steps from rerouting to retaining; published runs end after half of them
    positions: str = choice("attended", *POSITIONS)  # prompts too, or labels: answers alone
    mask_padding: bool = False
    retain_states: str = choice("truncated", *RETAIN_STATES)  # up to the layers, or all
    retain_distance: str = choice("absolute", *RETAIN_DISTANCES)  # or relative to the frozen state's length
    nudge: float = number(2.0**-8, at_least=0)  # radians, of states that have not moved yet

    def check(self) -> None:
        """Layers that are named once."""
        if self.layers is not None and not 0 < len(set(self.layers)) == len(self.layers):
            raise SettingError("layers", self.layers, "at least one index of a hidden state, each once")
