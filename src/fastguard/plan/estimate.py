"""Adds up a recipe: memory at its worst moment, time of a step and of a run, the largest batch that fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastguard.plan.cost import Cost, Recipe
from fastguard.plan.parts import Item, Part, held, peak
from fastguard.plan.setting import Setting
from fastguard.settings import Settings

LIMIT = 4096
"""Sequences a GPU beyond which nobody asks."""


@dataclass(frozen=True)
class Estimate:
    """One recipe under one setting.

    Attributes:
        moment: of a step at which most memory is held, ``memory`` bytes of it; ``host`` bytes beside that.
        seconds: of a step. hours: of the run. largest: sequences a GPU that fit, 0 where none does.
    """

    setting: Setting
    recipe: Recipe
    moment: str
    memory: float
    host: float
    seconds: float
    hours: float
    largest: int

    @property
    def fits(self) -> bool:
        """Whether the batch that was asked for fits."""
        return self.memory <= usable(self.setting)

    @property
    def at_peak(self) -> list[Item]:
        """What is held at the worst moment, largest first."""
        return sorted((i for i in held(self.recipe.items, self.moment) if i.bytes), key=lambda i: -i.bytes)


def usable(s: Setting) -> float:
    """Bytes of a GPU that a program can count on."""
    return s.gpu.memory * s.efficiency.usable


def estimate(s: Setting, cost: Cost, options: Settings, published: bool = False) -> Estimate:
    """The estimate of a method with its options, as it is here or as it was published."""
    build = cost.published if published else cost.here
    recipe = build(s, options)
    moment, memory = peak(recipe.items)
    seconds = sum(part.seconds(s) for part in recipe.parts)

    def fits(batch: int) -> bool:
        other = s.with_batch(batch)
        return peak(build(other, options).items)[1] <= usable(other)

    return Estimate(
        s, recipe, moment, memory, sum(i.bytes for i in recipe.items if i.host), seconds, seconds * s.steps / 3600,
        _largest(fits),
    )  # fmt: skip


def _largest(fits: Any) -> int:
    """The largest batch in 1 .. LIMIT that fits, by doubling and bisection: memory grows with the batch."""
    if not fits(1):
        return 0
    low = 1
    while low < LIMIT and fits(2 * low):
        low *= 2
    high = 2 * low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def as_dict(e: Estimate) -> dict[str, Any]:
    """Plain values: bytes, flops and seconds of one GPU."""
    s = e.setting

    def part(p: Part) -> dict[str, Any]:
        return {
            "name": p.name, "kind": p.kind, "count": p.count, "flops": p.flops, "memory_bytes": p.memory,
            "network_bytes": p.network, "host_bytes": p.host, "seconds": p.seconds(s),
        }  # fmt: skip

    return {
        "fits": e.fits,
        "memory_bytes": e.memory,
        "peak_moment": e.moment,
        "host_bytes": e.host,
        "step_seconds": e.seconds,
        "run_hours": e.hours,
        "gpu_hours": e.hours * s.gpus,
        "largest_batch": e.largest,
        "deviations": list(e.recipe.deviations),
        "memory": [
            {
                "name": i.name, "bytes": i.bytes, "host": i.host, "at_peak": i in held(e.recipe.items, e.moment),
                "moments": None if i.moments is None else sorted(i.moments),
            }
            for i in e.recipe.items if i.bytes
        ],
        "parts": [part(p) for p in e.recipe.parts],
    }  # fmt: skip
