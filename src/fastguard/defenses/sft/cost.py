"""What a step of plain fine-tuning costs, here and as published: see ``plan.cost``."""

from __future__ import annotations

from fastguard.defenses.sft.options import Options
from fastguard.plan import parts, passes
from fastguard.plan.cost import Cost, Recipe, moments_of, waiting
from fastguard.plan.parts import FP32, Part, item, resident
from fastguard.plan.setting import Setting


def here(s: Setting, o: Options) -> Recipe:
    """One batch: what every other defense is compared with. With ``retain_weight`` two, and one backward for both.

    Micro-batches have a backward each, those of one batch after those of the other.
    """
    names = ["step"] if o.retain_weight is None else ["step", "retain"]
    work: list[Part] = []
    items = resident(s)
    for i, name in enumerate(names):
        apart = s.micro is not None
        parts_of, held = passes.fused(s, name, s.batch, earlier=i > 0 if apart else name != names[-1])
        work += parts_of
        items += held if apart else waiting(held, name, *names[i + 1 :])  # else it comes to the last forward first
    return Recipe([*work, parts.outer_adamw(s)], items)


def published(s: Setting, o: Options) -> Recipe:
    """Cross-entropy on full logits, as transformers computes it."""
    names = ["step"] if o.retain_weight is None else ["step", "retain"]
    work: list[Part] = []
    items = resident(s)
    for i, name in enumerate(names):
        parts_of, held = passes.full(s, name, s.batch, earlier=name != names[-1])
        work += parts_of
        items += waiting(held, name, *names[i + 1 :])
        if name != names[-1]:
            later, rows = moments_of(*names[i + 1 :]), s.batch * s.tokens
            items.append(item("log-softmax that waits", float(rows * s.architecture.vocabulary * FP32), *later))
    return Recipe([*work, parts.outer_adamw(s)], items)


COST = Cost(here, published, divides=True)
