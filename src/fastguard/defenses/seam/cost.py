"""What a step of SEAM costs, here and as published: see ``plan.cost``."""

from __future__ import annotations

from dataclasses import replace

from fastguard.defenses.seam.options import Options
from fastguard.plan import parts, passes
from fastguard.plan.cost import Cost, Recipe, moments_of
from fastguard.plan.parts import FP32, Part, item, over_weights, resident
from fastguard.plan.setting import Setting

MOVED = ("harmful moved", "benign moved")


def here(s: Setting, o: Options) -> Recipe:
    """Gradients of four losses; the harmful forward serves two of them. Then two products with a Hessian.

    One is a pass with tangents, or a gradient once more at moved weights, see `planned_product`.
    """
    product, deviations = planned_product(s, o)
    a, w = s.architecture, s.precision.weights
    rows, n = s.rows * s.batch * s.tokens, s.batch * s.tokens
    harmful, head = passes.run(s, "harmful", s.batch), passes.fused_head(s, "harmful: head", rows)
    alone = s.gpus == 1
    if alone:  # not wrapped: its backward alone, of the forward that the unlearning makes; it meets the last lens too
        harmful, head = harmful[1:], replace(head, flops=head.flops - 2.0 * rows * a.head)
    steps: list[Part] = [
        *harmful,
        head,
        *passes.run(s, "unlearning", s.batch),
        passes.fused_head(s, "unlearning: output", rows),
        passes.lens_head(s, "lenses", rows, a.layers),
        passes.lens_head(s, "last lens", rows, 1, backwards=2 if alone else 1),
        *passes.run(s, "refusal", s.batch),
        passes.fused_head(s, "refusal: head", rows),
    ]
    items = [
        *resident(s),
        *passes.memory(s, "harmful", s.batch),
        *passes.fused_items(s, "harmful", rows),
        *passes.memory(s, "unlearning", s.batch),
        *passes.fused_items(s, "unlearning", rows, lenses=a.layers + 1, lens_rows=rows),
        *passes.memory(s, "refusal", s.batch, earlier=True),
        *passes.fused_items(s, "refusal", rows),
        item("stored gradient, harmful", s.shard * w, *moments_of("unlearning", "refusal", "benign", *MOVED)),
        item("accumulator", s.shard * w, *moments_of("benign", *MOVED)),
        item("stored gradient, benign", s.shard * w, *moments_of(*MOVED)),
        item("direction", s.shard * w, *moments_of(*MOVED)),
        *passes.memory(s, "benign", s.batch),
        *passes.fused_items(s, "benign", n),
    ]
    steps += [*passes.run(s, "benign", s.batch), passes.fused_head(s, "benign: head", n)]
    for name, count in zip(MOVED, (rows, n), strict=True):
        if product == "tangent":
            steps += passes.tangent_run(s, name, s.batch, count)
            items += passes.tangent_memory(s, name, s.batch, count)
        else:
            steps += [*passes.run(s, name, s.batch), passes.fused_head(s, f"{name}: head", count)]
            items += [*passes.memory(s, name, s.batch), *passes.fused_items(s, name, count)]
    there: list[Part] = []
    if product == "difference":
        items.append(parts.snapshot_item(s, *moments_of(*MOVED)))
        there = [
            over_weights(s, "norms of the directions", w, 2),
            parts.snapshot(s).times(2),
            over_weights(s, "perturb", 3 * w, 2),
            parts.restore(s).times(2),
            over_weights(s, "differences of the gradients", 3 * w, 2),
        ]
    return Recipe(
        [
            *steps,
            over_weights(s, "norms of the gradients", w, 2),
            over_weights(s, "inner product of the gradients", 2 * w),
            over_weights(s, "directions", 5 * w, 2),
            *there,
            over_weights(s, "accumulate", 3 * w, 2),
            parts.outer_adamw(s),
        ],
        items,
        deviations,
    )


def planned_product(s: Setting, o: Options) -> tuple[str, tuple[str, ...]]:
    """Which ``product`` a step has, and what is to be said of it.

    That of the options, where it can be had: tangents are not for shards, so that on several GPUs the default gives way
    to ``difference``. Raises ValueError for one that was given and cannot be had, or not be planned.
    """
    if o.product == "linearised":
        raise ValueError("product: expected tangent or difference, those that can be planned, got 'linearised'")
    if o.product == "tangent" and s.gpus > 1:
        if "product" in s.given:
            raise ValueError(f"product: expected difference, or tangent on 1 GPU, got 'tangent' on {s.gpus}: it is not "
                             "for shards")  # fmt: skip
        return "difference", ("product is difference here: tangent, the default, is not for shards",)
    return o.product, ()


def published(s: Setting, o: Options) -> Recipe:
    """Six passes on full logits, L + 2 of them for the unlearning; five copies of gradients and a clone of the weights.

    The published program keeps the copies on two further GPUs and sends the clone there and back twice; here they lie
    where the gradients are, sharded alike.
    """
    a, w = s.architecture, s.precision.weights
    n = s.batch * s.tokens
    names = ("unlearning", "refusal", "harmful", "benign", *MOVED)
    steps: list[Part] = []
    items = resident(s)
    for i, name in enumerate(names):
        heads = a.layers + 2 if name == "unlearning" else 1
        steps += [*passes.run(s, name, s.batch), passes.full_head(s, f"{name}: head", n, heads)]
        items += [*passes.memory(s, name, s.batch, head="full"), *passes.full_items(s, name, n)]
        if i:
            items.append(item(f"copies of {i} gradients", min(i, 5) * s.shard * w, *moments_of(name)))
    items += [
        item("full logits of the lenses", (a.layers + 1) * n * a.vocabulary * float(FP32), "unlearning: loss",
             "unlearning: last layer"),
        item("captured hidden states", passes.hidden_states(s, s.batch), "unlearning: loss", "unlearning: last layer"),
        item("clone of the weights", s.shard * w, *moments_of(*MOVED)),
    ]  # fmt: skip
    return Recipe(
        [
            *steps,
            over_weights(s, "copies of the gradients", 2 * w, 6),
            over_weights(s, "norms of the gradients", w, 2),
            over_weights(s, "inner product of the gradients", 2 * w),
            over_weights(s, "clone, move and put back", 7 * w, 2),
            over_weights(s, "combination of the gradients", 3 * w, 6),
            parts.outer_adamw(s),
        ],
        items,
    )


COST = Cost(here, published)
