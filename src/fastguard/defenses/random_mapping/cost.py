"""What a step of Random Mapping costs, here and as published: see ``plan.cost``."""

from __future__ import annotations

from fastguard.defenses.random_mapping.options import Options
from fastguard.plan import parts, passes
from fastguard.plan.cost import Cost, Recipe, moments_of
from fastguard.plan.parts import FP32, Part, item, resident
from fastguard.plan.setting import Setting


def here(s: Setting, o: Options) -> Recipe:
    """The retain batch, then the harmful one: every hidden state's distance from one set of directions, and no head."""
    n = s.batch * s.tokens
    states, directions = passes.hidden_states(s, s.batch), float(n * s.architecture.hidden * FP32)
    retain, held = passes.fused(s, "retain", s.batch)
    return Recipe(
        [
            *retain,
            *passes.run(s, "mapping", s.batch),
            # Live states and directions are read in the forward and again in the backward, which writes a gradient.
            Part("distance from the directions", "weights", 1,
                 memory=3 * states + 2 * (s.architecture.layers + 1) * directions),
            parts.outer_adamw(s),
        ],
        [
            *resident(s),
            *held,
            *passes.memory(s, "mapping", s.batch, earlier=True),
            item("random directions", directions * s.at_once(s.batch) / s.batch, *moments_of("mapping")),
        ],
    )  # fmt: skip


def published(s: Setting, o: Options) -> Recipe:
    """Full logits of both batches, the harmful one's for nothing; a V x D table, a copy of its rows for every state."""
    a, n = s.architecture, s.batch * s.tokens
    each = (a.layers + 1) * n * a.hidden * float(FP32)
    retain, held = passes.full(s, "retain", s.batch)
    widened = 0 if s.precision.compute == FP32 else 1
    return Recipe(
        [
            *retain,
            *passes.run(s, "mapping", s.batch),
            passes.full_head(s, "mapping: head", n, gradients="none", each=s.precision.compute),
            # Rows gathered; both sides' norms, quotients, their product and its sum, forth and back.
            Part("cosines with the directions", "weights", 1, memory=16 * each),
            parts.outer_adamw(s),
        ],
        [
            *resident(s),
            item("table of directions", float(a.head * FP32)),
            *held,
            *passes.memory(s, "mapping", s.batch, earlier=True, head="full"),
            item("full logits", n * a.vocabulary * float(s.precision.compute), *moments_of("mapping")),
            item("directions, a copy for every state", each, *moments_of("mapping")),
            # Of each state: both sides divided by their norms, and the state widened to fp32. Their backward comes
            # before the layers', for which the states' gradients wait.
            item("quotients", (2 + widened) * each, "mapping: loss"),
            item("gradients of the states", passes.hidden_states(s, s.batch), "mapping: last layer"),
        ],
    )


COST = Cost(here, published, divides=True)
