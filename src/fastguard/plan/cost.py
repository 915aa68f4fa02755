"""What a method tells the planner: the parts of its step, and what the step holds, here and in the published code.

The published programs are given the same sharding, kernels and precision; what differs is what their algorithm asks
for: full logits, second models, copies of gradients and weights, captured activations. A difference between the two is
one of algorithms, not of tuning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from fastguard.plan.parts import Item, Part
from fastguard.plan.passes import END, FIRST, LAST, LOSS, PASSING
from fastguard.plan.setting import Setting


@dataclass(frozen=True)
class Recipe:
    """The parts of a step, and what one GPU holds during it.

    Attributes:
        deviations: in what the plan is not of the options as they stand, a sentence each without its stop.
    """

    parts: list[Part]
    items: list[Item]
    deviations: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cost:
    """A method's step on paper; what an `Entry` leads to (``cost="package.module:COST"``). Free of torch.

    Attributes:
        here, published: from the job and the method's options to the recipe of a step. They raise ValueError for a job
            or an option that the method does not have or that they do not know.
        divides: whether ``here`` knows micro-batches. Elsewhere a batch is one, whatever the job says.
    """

    here: Callable[[Setting, Any], Recipe]
    published: Callable[[Setting, Any], Recipe]
    divides: bool = False


def moments_of(*names: str) -> tuple[str, ...]:
    """All moments of the passes of these names."""
    return tuple(f"{name}: {moment}" for name in names for moment in (LOSS, LAST, FIRST, END))


def waiting(items: Iterable[Item], name: str, *others: str) -> list[Item]:
    """The items of a pass whose backward comes after whole other passes: what waits for it is held during these."""
    longer = frozenset(moments_of(*others))
    return [
        replace(i, moments=i.moments | longer)
        if i.moments is not None and f"{name}: {LOSS}" in i.moments and i.name not in PASSING
        else i
        for i in items
    ]
