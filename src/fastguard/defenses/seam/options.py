"""Options of SEAM; numbers as published."""

from __future__ import annotations

from dataclasses import dataclass

from fastguard.settings import Settings, choice, number

PRODUCTS = ("tangent", "linearised", "difference")
BOUNDARIES = ("constant", "predicted")


@dataclass(frozen=True)
class Options(Settings):
    """See ``fastguard.SEAM``."""

    alpha: float = number(1.0, at_least=0)  # of the refusals' cross-entropy
    beta: float = number(0.01, at_least=0)  # of the cosine between the harmful and the benign gradient
    eps: float = number(1e-3, above=0)  # length of the steps that stand for a derivative; not for tangent
    product: str = choice("tangent", *PRODUCTS)  # published: difference
    mask_padding: bool = False  # published: padding where answers differ in length carries loss
    boundary: str = choice("constant", *BOUNDARIES)  # constant: the first differing token gives no gradient

    def uncompilable(self, processes: int) -> str:
        """See `Settings.uncompilable`."""
        twice = "a compiled backward cannot be differentiated again (product: difference does without it)"
        return twice if self.product == "tangent" else ""
