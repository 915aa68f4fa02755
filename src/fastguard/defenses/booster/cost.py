"""What a step of Booster costs, here and as published: see ``plan.cost``."""

from __future__ import annotations

from fastguard.defenses.booster.options import Options
from fastguard.plan import parts, passes
from fastguard.plan.cost import Cost, Recipe, moments_of
from fastguard.plan.parts import Item, Part, item, over_weights, resident
from fastguard.plan.setting import Setting


def here(s: Setting, o: Options) -> Recipe:
    """Harmful gradient at w, again at w - a g / ||g||, and the alignment gradient: three passes, one snapshot.

    Raises ValueError for ``mode`` linearised, which is not for sharded models, and whose products are not known here.
    """
    if o.mode != "weights":
        raise ValueError(f"mode: expected weights, the one that can be planned, got {o.mode!r}")
    w = s.precision.weights
    steps: list[Part] = []
    items: list[Item] = []
    for name in ("harmful", "perturbed", "alignment"):
        work, held = passes.fused(s, name, s.batch)
        steps += work
        items += held
    return Recipe(
        [
            *steps,
            over_weights(s, "norms of gradients", w, 3),
            parts.snapshot(s),
            over_weights(s, "perturb", 3 * w),
            parts.restore(s),
            over_weights(s, "difference of the gradients", 3 * w, 2),
            parts.outer_adamw(s),
        ],
        [
            *resident(s),
            parts.snapshot_item(s, *moments_of("perturbed")),
            item("stored gradient", s.shard * w, *moments_of("perturbed", "alignment")),
            *items,
        ],
    )


def published(s: Setting, o: Options) -> Recipe:
    """Three passes on full logits; both harmful gradients copied; the step taken back by adding, without a snapshot."""
    w = s.precision.weights
    steps: list[Part] = []
    items = [
        *resident(s),
        item("stored gradient, harmful", s.shard * w, *moments_of("perturbed", "alignment")),
        item("stored gradient, perturbed", s.shard * w, *moments_of("alignment")),
    ]
    for name in ("harmful", "perturbed", "alignment"):
        work, held = passes.full(s, name, s.batch)
        steps += work
        items += held
    return Recipe(
        [
            *steps,
            over_weights(s, "copies of the gradients", 2 * w, 2),
            over_weights(s, "norm of the gradient", w),
            over_weights(s, "perturb and take back", 3 * w, 2),
            over_weights(s, "combination of the gradients", 4 * w),
            parts.outer_adamw(s),
        ],
        items,
    )


COST = Cost(here, published, divides=True)
