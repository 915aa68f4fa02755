"""What a step of Representation Noising costs, here and as published: see ``plan.cost``."""

from __future__ import annotations

from dataclasses import replace

from fastguard.defenses.repnoise.options import Options
from fastguard.plan import parts, passes
from fastguard.plan.cost import Cost, Recipe, waiting
from fastguard.plan.parts import FP32, Item, Part, item, resident
from fastguard.plan.setting import Setting


def here(s: Setting, o: Options) -> Recipe:
    """Harmful and harmless as one batch of 2 B; hidden states of the harmful half through the head; noise.

    Rows: a share of each half's positions carries loss. The output is computed exactly, the inner states by live
    columns. A retain batch, which the published loss does not have, is there where ``retain_weight`` was given: its
    forward comes after the pair's, its backward before.

    With micro-batches each half has a backward of its own. The harmful one, which is the last, stays whole, since its
    noise term compares all of its samples with each other; the others are divided.
    """
    a = s.architecture
    rows = s.rows * s.batch * s.tokens
    lenses = a.layers + 1 if o.layers is None else o.layers
    if lenses > a.layers + 1:
        raise ValueError(f"layers: expected 1 to {a.layers + 1}, the hidden states of {a.name}, got {o.layers}")
    retains = "retain_weight" in s.given
    whole = replace(s, micro=None)
    name, samples, outputs = ("pair", 2 * s.batch, 2 * rows) if s.micro is None else ("harmful", s.batch, rows)
    work = [
        *passes.run(whole, name, samples, tapped=True),
        passes.fused_head(s, f"{name}: output", outputs),
        passes.lens_head(s, "lenses", rows, lenses),
        gaussian_mmd(s),
    ]
    items = [
        *passes.memory(whole, name, samples, earlier=retains or s.micro is not None),
        *passes.fused_items(s, name, outputs, lenses=lenses, lens_rows=rows),
        *mlp_outputs(s, name, samples),
        item("noise: Gram matrices", a.layers * (2 * s.batch) ** 2 * FP32, f"{name}: loss", f"{name}: last layer"),
        # A lens's gradient arrives as fp32 rows and as the dense gradient of the hidden state that they are part of.
        item("a lens's gradient", rows * a.hidden * FP32 + samples * s.tokens * a.hidden * s.precision.compute,
             f"{name}: last layer", f"{name}: first layer"),
    ]  # fmt: skip
    if s.micro is not None:
        parts_of, held = passes.fused(s, "harmless", s.batch, rows=rows)
        work += parts_of
        items += held
    if retains:
        parts_of, held = passes.fused(s, "retain", s.batch, earlier=s.micro is not None)
        work += parts_of
        items = [*(waiting(items, "pair", "retain") if s.micro is None else items), *held]
    return Recipe([*work, parts.outer_adamw(s)], [*resident(s), *items])


def published(s: Setting, o: Options) -> Recipe:
    """Two forwards, L + 2 full logits of the harmful batch, 2B x 2B x T D differences a layer; one backward for all."""
    a, c = s.architecture, s.precision.compute
    m = s.batch * s.tokens
    differences = (2.0 * s.batch) ** 2 * s.tokens * a.hidden * c  # one layer's, [2B, 2B, T D]
    held = ("pair: loss", "pair: last layer")
    items = [
        *resident(s),
        *passes.memory(s, "pair", s.batch, head="full"),
        item("the other batch's checkpoints" if s.checkpointing else "the other batch's activations",
             passes.checkpoint_bytes(s, s.batch), *held),
        # Of each hidden state, of the output and of the harmless batch the fp32 log-softmax waits for the backward.
        item("full logits", (a.layers + 3) * m * a.vocabulary * float(FP32), "pair: loss"),
        item("full logits of the lenses", (a.layers + 1) * m * a.vocabulary * float(FP32), "pair: last layer"),
        # Every layer's differences wait too. Their backward comes first, with two tensors of that size for the layer at
        # work; when they are gone a head's two gradients follow.
        item("differences of the noise term", max((a.layers + 2) * differences, 2.0 * m * a.vocabulary * FP32),
             "pair: loss"),
        item("captured MLP outputs", float(a.layers * m * a.hidden * c), *held),
        item("normed states of the lenses", (a.layers + 1) * m * a.hidden * float(FP32 + 2 * c), *held),
    ]  # fmt: skip
    if s.lora is None:
        items.append(item("head's gradients", 2.0 * a.head * c, *held))
    return Recipe(
        [
            *passes.run(s, "harmful, harmless", s.batch, 2),
            passes.full_head(s, "output and lenses", m, a.layers + 2),
            passes.full_head(s, "harmless: head", m),
            # A layer: the difference written, read, squared and written, read and summed; the backward writes the
            # square's gradient, reads it and the difference, writes the difference's, and reads that twice to sum
            # over both axes.
            Part("noise (MMD)", "weights", 1, memory=9 * differences).times(a.layers),
            parts.outer_adamw(s),
        ],
        items,
    )


def mlp_outputs(s: Setting, name: str, samples: int) -> list[Item]:
    """Without checkpointing the noise taps keep the MLPs' outputs, which the model would let go; it remakes them with
    it.
    """
    a = s.architecture
    size = float(a.layers * samples * s.tokens * a.hidden * s.precision.compute)
    return [] if s.checkpointing else [item("taps: MLP outputs", size, f"{name}: loss", f"{name}: last layer")]


def gaussian_mmd(s: Setting) -> Part:
    """A 2B x 2B Gram matrix of rows of T D features a layer, and its backward: x read twice, its gradient written
    once.
    """
    a, c = s.architecture, s.precision.compute
    features = s.tokens * a.hidden
    flops = 2.0 * (2 * s.batch) ** 2 * features + 2.0 * s.batch * 2 * s.batch * features
    return Part("noise (MMD)", "weights", 1, flops, 3.0 * s.batch * features * c).times(a.layers)


COST = Cost(here, published, divides=True)
