"""The optimizers and the schedules of a run, by name."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastguard.settings import SettingError, Settings, choice, number, numbers

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


@dataclass(frozen=True)
class OptimizerConfig(Settings):
    """What steps on a method's gradients, and how its learning rate goes.

    ``schedulefree``: AdamW whose weights are an average of its iterates and that needs no schedule (Defazio et al.
    2024, arXiv 2405.15682; its authors' package of that name). Tamper-Resistant Safeguards were published with it.
    """

    name: str = choice("adamw", "adamw", "schedulefree")
    schedule: str = choice("warmup_cosine", "warmup_cosine", "linear", "constant")  # each begins with the warm-up
    clip: float = number(1.0, above=0)  # the gradient's largest norm
    weight_decay: float = number(0.0, at_least=0)
    betas: tuple[float, ...] = numbers((0.9, 0.999), at_least=0)

    def check(self) -> None:
        """Two betas below 1; no schedule where none is wanted."""
        if len(self.betas) != 2 or max(self.betas) >= 1:
            raise SettingError("betas", self.betas, "two numbers, each below 1")
        if self.name == "schedulefree" and self.schedule != "constant":
            raise SettingError("schedule", self.schedule, "constant with the optimizer schedulefree")

    def required(self, where: str) -> None:
        """Raise ImportError where its package is not there; ``where`` is the section's name."""
        if self.name == "schedulefree" and importlib.util.find_spec("schedulefree") is None:
            raise ImportError(
                f"{where}.name: schedulefree needs the package of that name: pip install "
                "'fastguard-kernels[schedulefree]'"
            )

    def build(self, parameters: Sequence[nn.Parameter]) -> Optimizer:
        """The optimizer, whose learning rate is set before each step; see `averaged`."""
        groups, how = _by_mesh(parameters), {"lr": 1.0, "betas": self.betas, "weight_decay": self.weight_decay}
        if self.name == "adamw":
            from torch.optim import AdamW

            return AdamW(groups, **how, fused=True)  # type: ignore[arg-type]
        import schedulefree

        made: Optimizer = schedulefree.AdamWScheduleFree(groups, **how)
        made.train()  # type: ignore[attr-defined]
        return made

    def factor(self, progress: float, warmup: float) -> float:
        """Of the learning rate at ``progress`` in [0, 1]: linear up to ``warmup``, then as the schedule says.

        A cosine ends at a tenth; ``linear`` at nothing.
        """
        if progress < warmup:
            return max(progress / warmup, 0.1)
        if self.schedule == "warmup_cosine":
            return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))
        return (1 - progress) / (1 - warmup) if self.schedule == "linear" else 1.0


def averaged(optimizer: Optimizer) -> None:
    """At the end of a training: leave the weights that the optimizer stands for, if it steps from others."""
    if hasattr(optimizer, "eval"):
        optimizer.eval()


def _by_mesh(parameters: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    """Groups of parameters that are sharded over one mesh: an optimizer's fused step takes no others together."""
    found: dict[Any, list[nn.Parameter]] = {}
    for p in parameters:
        found.setdefault(getattr(p, "device_mesh", None), []).append(p)
    return [{"params": group} for group in found.values()]
