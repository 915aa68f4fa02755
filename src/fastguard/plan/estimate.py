"""Adds up a recipe: memory at its worst moment, time of a step and of a run, what binds, the fewest GPUs that fit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fastguard.plan.cost import Cost, Recipe
from fastguard.plan.parts import Item, Part, held, peak
from fastguard.plan.setting import Setting
from fastguard.settings import Settings

LIMIT = 1024
"""GPUs beyond which nobody asks."""


@dataclass(frozen=True)
class Estimate:
    """One recipe under one setting.

    Attributes:
        moment: of a step at which most memory is held, ``memory`` bytes of it; ``host`` bytes beside that.
        seconds: of a step. hours: of the run.
        fewest: GPUs on which a step fits, in micro-batches of one sequence where these are known; None: on none.
    """

    setting: Setting
    recipe: Recipe
    moment: str
    memory: float
    host: float
    seconds: float
    hours: float
    fewest: int | None

    @property
    def fits(self) -> bool:
        """Whether a step fits on the GPUs that were asked for."""
        return self.memory <= usable(self.setting)

    @property
    def needs(self) -> dict[str, float]:
        """Seconds of a step that its work would need of each, were it alone; see ``Part.needs``."""
        each = [part.needs(self.setting) for part in self.recipe.parts]
        return {name: sum(needs[name] for needs in each) for name in ("compute", "bandwidth", "network", "host")}

    @property
    def bound(self) -> tuple[str, float]:
        """What a step takes longest for, and how many times what comes next.

        ``memory`` where it does not fit, and how many times what there is.
        """
        if not self.fits:
            return "memory", self.memory / usable(self.setting)
        (second, _), (first, name) = sorted((seconds, name) for name, seconds in self.needs.items())[-2:]
        return name, first / second

    @property
    def at_peak(self) -> list[Item]:
        """What is held at the worst moment, largest first."""
        return sorted((i for i in held(self.recipe.items, self.moment) if i.bytes), key=lambda i: -i.bytes)


def usable(s: Setting) -> float:
    """Bytes of a GPU that a program can count on."""
    return s.gpu.memory * s.efficiency.usable


def estimate(s: Setting, cost: Cost, options: Settings, published: bool = False) -> Estimate:
    """The estimate of a method with its options, as it is here or as it was published.

    Where micro-batches are not known, and as published, a batch is one, whatever the setting says. `divided` finds
    some that fit.
    """
    if published or not cost.divides:
        s = replace(s, micro=None)
    recipe = (cost.published if published else cost.here)(s, options)
    moment, memory = peak(recipe.items)
    seconds = sum(part.seconds(s) for part in recipe.parts)
    return Estimate(
        s, recipe, moment, memory, sum(i.bytes for i in recipe.items if i.host), seconds, seconds * s.steps / 3600,
        _fewest(s, cost, options, published),
    )  # fmt: skip


def divided(s: Setting, cost: Cost, options: Settings) -> Setting:
    """The setting with the largest micro-batches that fit, or that fit best; as it is where the whole batch fits."""

    def fits(micro: int | None) -> bool:
        return peak(cost.here(replace(s, micro=micro), options).items)[1] <= usable(s)

    if not cost.divides or s.micro is not None or fits(None):
        return s
    low, high = 1, s.batch + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return replace(s, micro=low)


def _fewest(s: Setting, cost: Cost, options: Settings, published: bool) -> int | None:
    """The first of 1, 2, 4 and so on GPUs of a node, and then of whole nodes, on which a step fits."""
    node = s.gpu.per_node
    build, micro = (cost.published, None) if published else (cost.here, 1 if cost.divides else None)
    for gpus in [*(2**i for i in range(node.bit_length() - 1)), *range(node, LIMIT + 1, node)]:
        try:
            items = build(replace(s, gpus=gpus, micro=micro), options).items
        except ValueError:  # an option that so many GPUs cannot have
            continue
        if peak(items)[1] <= usable(s):
            return gpus
    return None


def as_dict(e: Estimate) -> dict[str, Any]:
    """Plain values: bytes, flops and seconds of one GPU."""
    s = e.setting

    def part(p: Part) -> dict[str, Any]:
        return {
            "name": p.name, "kind": p.kind, "count": p.count, "flops": p.flops, "memory_bytes": p.memory,
            "network_bytes": p.network, "node_bytes": p.node, "host_bytes": p.host, "seconds": p.seconds(s),
        }  # fmt: skip

    return {
        "fits": e.fits,
        "memory_bytes": e.memory,
        "peak_moment": e.moment,
        "host_bytes": e.host,
        "step_seconds": e.seconds,
        "run_hours": e.hours,
        "gpu_hours": e.hours * s.gpus,
        "fewest_gpus": e.fewest,
        "micro_batch": s.micro,
        "bound": dict(zip(("by", "times"), e.bound, strict=True)),
        "needs_seconds": e.needs,
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
