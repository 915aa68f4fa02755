"""What a step of T-Vaccine costs, here and as published: see ``plan.cost``."""

from __future__ import annotations

from fastguard.defenses.t_vaccine.options import Options
from fastguard.defenses.vaccine.cost import perturbed, perturbed_as_published
from fastguard.plan.cost import Cost, Recipe
from fastguard.plan.setting import Setting


def here(s: Setting, o: Options) -> Recipe:
    """S of L layers are perturbed; every so many steps a pass over one sample weighs the layers.

    All weights' gradients are computed, as they are under FSDP2 whatever ``trains`` says.
    """
    return perturbed(s, _layers(s, o), 1 / o.probe_every)


def published(s: Setting, o: Options) -> Recipe:
    """S of L layers, and a probing pass."""
    return perturbed_as_published(s, _layers(s, o), 1 / o.probe_every)


def _layers(s: Setting, o: Options) -> int:
    """S. The published 8 are all layers of a model that has fewer."""
    count = s.architecture.layers
    if "layers" in s.given and o.layers > count:
        raise ValueError(f"layers: expected 1 to {count}, the layers of {s.architecture.name}, got {o.layers}")
    return min(o.layers, count)


COST = Cost(here, published, divides=True)
