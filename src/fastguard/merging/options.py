"""What each method can be told; defaults are the published ones, or mergekit's where the method is mergekit's."""

from __future__ import annotations

from dataclasses import dataclass

from fastguard.merging.parameters import Parameter, checked
from fastguard.settings import SettingError, Settings, choice, number


@dataclass(frozen=True)
class Linear(Settings):
    """sum(weight W) / sum(weight) over the models, or without the divisor."""

    normalize: bool = True


@dataclass(frozen=True)
class Slerp(Settings):
    """From base (t = 0) to model (t = 1) on the arc between them."""

    t: Parameter = 0.5

    def check(self) -> None:  # noqa: D102
        object.__setattr__(self, "t", checked("t", self.t))


@dataclass(frozen=True)
class TaskArithmetic(Settings):
    """base + scale sum(weight (W - base)), arXiv 2212.04089. ``scale`` is what mergekit calls lambda."""

    normalize: bool = False
    scale: float = number(1.0)


@dataclass(frozen=True)
class Ties(TaskArithmetic):
    """The same of trimmed changes with the elected sign, arXiv 2306.01708."""

    normalize: bool = True


@dataclass(frozen=True)
class Dare(TaskArithmetic):
    """The same of changes some of which are dropped at random, the rest divided by the density, arXiv 2311.03099."""

    rescale: bool = True
    seed: int = number(0, at_least=0, below=2**64)


@dataclass(frozen=True)
class Resta(Settings):
    """model + gamma (aligned - unaligned), arXiv 2402.11746; with ``drop``, DARE on what fine-tuning changed."""

    gamma: float = number(0.5)
    drop: float = number(0.0, at_least=0, below=1)
    rescale: bool = True
    seed: int = number(0, at_least=0, below=2**64)


@dataclass(frozen=True)
class Farn(Settings):
    """Between the models before (weight 0) and after fine-tuning (weight 1), arXiv 2412.19512."""

    weight: float = number(0.5)
    form: str = choice("linear", "linear", "slerp")


@dataclass(frozen=True)
class SafeLora(Settings):
    """Changes that point away from what alignment changed are replaced by their projection, arXiv 2405.16833."""

    tau: float | None = number(None, at_least=-1, at_most=1)  # project where the cosine is at most this
    lowest: int | None = number(None, at_least=1)  # or in so many modules, those of the lowest; neither: 10
    projector: bool = False  # a true projector instead of V V^T / ||V||_F
    rank: int | None = number(None, at_least=1)  # of it; None: all directions that V has
    modules: tuple[str, ...] = ()  # parts of names; none: every matrix but embedding and head

    def check(self) -> None:  # noqa: D102
        if self.tau is not None and self.lowest is not None:
            raise SettingError("lowest", self.lowest, "tau or lowest, not both")
        if self.rank is not None and not self.projector:
            raise SettingError("rank", self.rank, "it with projector alone")

    @property
    def count(self) -> int | None:
        """How many modules; None: all that pass tau."""
        return None if self.tau is not None else 10 if self.lowest is None else self.lowest


@dataclass(frozen=True)
class Somf(Settings):
    """base + coefficient sum(m (model - base)) / mean(m), arXiv 2405.09055; the base is the safe model."""

    coefficient: float = number(0.3)
    masks: str | None = None  # a safetensors file of m's logits by tensor; without them m = 1
    export: str = choice("probability", "probability", "binary", "threshold")  # what m is, see merging/somf.py
    seed: int = number(0, at_least=0, below=2**64)


@dataclass(frozen=True)
class Lox(Settings):
    """model + coefficient SVD_rank(model - base), arXiv 2506.15606."""

    rank: int = number(6, at_least=1)
    coefficient: float = number(1.25)
    seed: int = number(0, at_least=0, below=2**63)


OPTIONS: dict[str, type[Settings]] = {
    "linear": Linear,
    "slerp": Slerp,
    "task_arithmetic": TaskArithmetic,
    "ties": Ties,
    "dare_linear": Dare,
    "dare_ties": Dare,
    "resta": Resta,
    "farn": Farn,
    "safe_lora": SafeLora,
    "lox": Lox,
    "somf": Somf,
}
"""By method."""
