"""What a step of Representation Noising costs, here and as published: see ``plan.cost``."""

from __future__ import annotations

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
    """
    a, c = s.architecture, s.precision.compute
    rows = s.rows * s.batch * s.tokens
    samples = 2 * s.batch
    lenses = a.layers + 1 if o.layers is None else o.layers
    if lenses > a.layers + 1:
        raise ValueError(f"layers: expected 1 to {a.layers + 1}, the hidden states of {a.name}, got {o.layers}")
    retains = "retain_weight" in s.given
    work = [
        *passes.run(s, "pair", samples, tapped=True),
        passes.fused_head(s, "pair: output", 2 * rows),
        passes.lens_head(s, "lenses", rows, lenses),
        gaussian_mmd(s),
        parts.outer_adamw(s),
    ]
    items = [
        *passes.memory(s, "pair", samples, earlier=retains),
        *passes.fused_items(s, "pair", 2 * rows, lenses=lenses, lens_rows=rows),
        *mlp_outputs(s, samples),
        item("noise: Gram matrices", a.layers * (2 * s.batch) ** 2 * FP32, "pair: loss", "pair: last layer"),
        # A lens's gradient arrives as fp32 rows and as the dense gradient of the hidden state that they are part of.
        item("a lens's gradient", rows * a.hidden * FP32 + samples * s.tokens * a.hidden * c, "pair: last layer",
             "pair: first layer"),
    ]  # fmt: skip
    if retains:
        n = s.batch * s.tokens
        work[-1:-1] = [*passes.run(s, "retain", s.batch), passes.fused_head(s, "retain: head", n)]
        items = waiting(items, "pair", "retain")
        items += [*passes.memory(s, "retain", s.batch), *passes.fused_items(s, "retain", n)]
    return Recipe(work, [*resident(s), *items])


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


def mlp_outputs(s: Setting, samples: int) -> list[Item]:
    """Without checkpointing the noise taps keep the MLPs' outputs, which the model would let go; it remakes them with
    it.
    """
    a = s.architecture
    size = float(a.layers * samples * s.tokens * a.hidden * s.precision.compute)
    return [] if s.checkpointing else [item("taps: MLP outputs", size, "pair: loss", "pair: last layer")]


def gaussian_mmd(s: Setting) -> Part:
    """A 2B x 2B Gram matrix of rows of T D features a layer, and its backward: x read twice, its gradient written
    once.
    """
    a, c = s.architecture, s.precision.compute
    features = s.tokens * a.hidden
    flops = 2.0 * (2 * s.batch) ** 2 * features + 2.0 * s.batch * 2 * s.batch * features
    return Part("noise (MMD)", "weights", 1, flops, 3.0 * s.batch * features * c).times(a.layers)


COST = Cost(here, published)
