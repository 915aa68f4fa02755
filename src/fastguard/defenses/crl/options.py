"""Options of CRL; defaults are those of the published port."""

from __future__ import annotations

from dataclasses import dataclass

from fastguard.settings import SettingError, Settings, choice, number

DISTANCES = ("cosine", "norm")

FARTHEST = 2.0
"""What a cosine distance can be at most, and with it the difference of two."""


@dataclass(frozen=True)
class Options(Settings):
    """See ``fastguard.CRL``."""

    alpha: float = number(0.5, at_least=0)  # of the harmless hinge
    beta: float = number(0.4, at_least=0)  # of the harmful hinge
    gamma: float = number(0.9, at_least=0)  # of the divergence from the reference's predictions, per token
    benign_margin: float = number(0.3, at_least=0)
    harmful_margin: float = number(0.5, at_least=0)
    distance: str = choice("cosine", *DISTANCES)
    layers: tuple[int, ...] | None = number(None, at_least=0)  # hidden states; None: the port's, scaled
    temperature: float = number(1.0, above=0)  # of the divergence, which is not multiplied by its square

    def check(self) -> None:
        """Hinges that can close, and layers that are named once."""
        if self.distance == "cosine":
            for name in ("benign_margin", "harmful_margin"):
                if (margin := getattr(self, name)) >= FARTHEST:
                    raise SettingError(
                        name, margin, "a number < 2 with distance cosine, which is at most 2: the hinge never closes"
                    )
        if self.layers is not None and not 0 < len(set(self.layers)) == len(self.layers):
            raise SettingError("layers", self.layers, "at least one index of a hidden state, each once")
