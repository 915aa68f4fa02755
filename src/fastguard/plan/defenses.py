"""What one step of each defense consists of here. ``published.py`` says the same of the published code.

Every function takes a setting and returns a `Recipe`: the parts of a step and what it holds in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fastguard.plan import parts, passes
from fastguard.plan.parts import FP32, Item, Part, adamw, item, over_weights, resident
from fastguard.plan.passes import END, FIRST, LAST, LOSS
from fastguard.plan.setting import Setting


@dataclass(frozen=True)
class Recipe:
    """The parts of a step, and what one GPU holds during it."""

    parts: list[Part]
    items: list[Item]


def moments_of(*names: str) -> tuple[str, ...]:
    """All moments of the passes of these names."""
    return tuple(f"{name}: {moment}" for name in names for moment in (LOSS, LAST, FIRST, END))


def sft(s: Setting) -> Recipe:
    """Plain fine-tuning on one batch: what every other defense is compared with."""
    n = s.batch * s.tokens
    return Recipe(
        [
            *passes.run(s, "step", s.batch),
            passes.fused_head(s, "step: head", n),
            parts.outer_adamw(s),
        ],
        [*resident(s), *passes.memory(s, "step", s.batch), *passes.fused_items(s, "step", n)],
    )


def repnoise(s: Setting) -> Recipe:
    """Harmful and harmless as one batch of 2 B; L + 1 hidden states of the harmful half through the head; noise.

    Rows: a share of each half's positions carries loss. The output is computed exactly, the inner states by live
    columns.
    """
    a, c = s.architecture, s.precision.compute
    rows = s.rows * s.batch * s.tokens
    samples = 2 * s.batch
    return Recipe(
        [
            *passes.run(s, "pair", samples, tapped=True),
            passes.fused_head(s, "pair: output", 2 * rows),
            passes.lens_head(s, "lenses", rows, a.layers + 1),
            gaussian_mmd(s),
            parts.outer_adamw(s),
        ],
        [
            *resident(s),
            *passes.memory(s, "pair", samples),
            *passes.fused_items(s, "pair", 2 * rows, lenses=a.layers + 1, lens_rows=rows),
            *mlp_outputs(s, samples),
            item("noise: Gram matrices", a.layers * (2 * s.batch) ** 2 * FP32, "pair: loss", "pair: last layer"),
            # A lens's gradient arrives as fp32 rows and as the dense gradient of the hidden state that they are part
            # of.
            item("a lens's gradient", rows * a.hidden * FP32 + samples * s.tokens * a.hidden * c, "pair: last layer",
                 "pair: first layer"),
        ],
    )  # fmt: skip


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


def tar(s: Setting) -> Recipe:
    """K steps of a simulated attacker; the tamper loss read at every n-th; then the retain loss at the original
    weights.

    The retain loss compares hidden states with those of the initial weights, which change places with the live ones for
    the length of a forward (LoRA: the adapter is switched off).
    """
    reads = s.inner_steps / s.read_every
    n, attacked = s.batch * s.tokens, s.adversary * s.tokens
    attack = moments_of("attack", "tamper")
    w = s.precision.weights
    exchange = 4 * w if s.lora is None else 0  # there and back, both ways
    steps = [
        parts.snapshot(s),
        *passes.run(s, "attack", s.adversary, s.inner_steps),
        passes.fused_head(s, "attack: head", attacked, s.inner_steps),
        adamw(s, "inner AdamW", FP32, s.inner_steps),
        *passes.run(s, "tamper", s.batch, reads),
        passes.fused_head(s, "tamper: head", n, reads),
        parts.accumulate(s, "accumulate", reads),
        parts.restore(s),
        over_weights(s, "exchange with the initial weights", exchange, host_each=exchange),
        *passes.run(s, "reference", s.batch, gradients="none"),
        *passes.run(s, "retain", s.batch),
        passes.fused_head(s, "retain: head", n),
        representation_distance(s),
        parts.outer_adamw(s),
    ]
    initial = s.shard * w if s.lora is None else 0.0
    return Recipe(
        [part for part in steps if part.flops + part.memory + part.host > 0],
        [
            *resident(s),
            item("inner optimizer", 2 * s.shard * FP32, *attack),
            parts.snapshot_item(s, *attack),
            item("outer accumulator", s.shard * FP32, *attack),
            Item("initial weights", initial, host=True),
            *passes.memory(s, "attack", s.adversary),
            *passes.fused_items(s, "attack", attacked),
            *passes.memory(s, "tamper", s.batch),
            *passes.fused_items(s, "tamper", n),
            *passes.memory(s, "reference", s.batch, gradients="none"),
            *passes.memory(s, "retain", s.batch, earlier=True),
            *passes.fused_items(s, "retain", n),
            item("reference: hidden states", passes.hidden_states(s, s.batch), *moments_of("reference", "retain")),
        ],
    )


def representation_distance(s: Setting) -> Part:
    """Reads live and reference states, reads them again in the backward, writes the live ones' gradient."""
    return Part("representation distance", "weights", 1, memory=5 * passes.hidden_states(s, s.batch))


def booster(s: Setting) -> Recipe:
    """Harmful gradient at w, again at w - a g / ||g||, and the alignment gradient: three passes, one snapshot."""
    w, n = s.precision.weights, s.batch * s.tokens
    steps: list[Part] = []
    for name in ("harmful", "perturbed", "alignment"):
        steps += [*passes.run(s, name, s.batch), passes.fused_head(s, f"{name}: head", n)]
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
            *passes.memory(s, "harmful", s.batch),
            *passes.fused_items(s, "harmful", n),
            *passes.memory(s, "perturbed", s.batch),
            *passes.fused_items(s, "perturbed", n),
            *passes.memory(s, "alignment", s.batch),
            *passes.fused_items(s, "alignment", n),
        ],
    )


def _vaccine(s: Setting, layers: float, probe: float) -> Recipe:
    """Vaccine on so many layers, and a probing pass of the same kind ``probe`` times a step."""
    a, c, n = s.architecture, s.precision.compute, s.batch * s.tokens
    # The lowest of S layers drawn from L without replacement is on average layer (L - S) / (S + 1).
    lowest = (a.layers - layers) / (layers + 1)
    steps = [
        *passes.run(s, "recording", s.batch, gradients="activations", stop=lowest),
        passes.fused_head(s, "recording: head", n, gradients="activations"),
        *passes.run(s, "perturbed", s.batch),
        passes.fused_head(s, "perturbed: head", n),
    ]
    if probe:
        steps += passes.run(s, "probing", 1, probe, gradients="activations", stop=0)
        steps.append(passes.fused_head(s, "probing: head", s.tokens, probe, gradients="activations"))
    each = layers * n * a.hidden * c
    steps += [Part("perturbation of the activations", "weights", 1, memory=6 * each), parts.outer_adamw(s)]
    return Recipe(
        steps,
        [
            *resident(s),
            *passes.memory(s, "recording", s.batch, gradients="activations"),
            *passes.fused_items(s, "recording", n, gradients="activations"),
            *passes.memory(s, "perturbed", s.batch),
            *passes.fused_items(s, "perturbed", n),
            item("activation perturbation", each, "recording: first layer", *moments_of("perturbed")),
        ],
    )


def vaccine(s: Setting) -> Recipe:
    """Two passes: one that records gradients of the attention outputs and no weight's, one with them added."""
    return _vaccine(s, s.architecture.layers, 0)


def t_vaccine(s: Setting) -> Recipe:
    """Vaccine on S of L layers; every so many steps a pass over one sample that weighs the layers."""
    return _vaccine(s, min(s.perturbed_layers, s.architecture.layers), 1 / s.probe_every)


@dataclass(frozen=True)
class Defense:
    """A defense that can be planned. steps: of a whole run where nothing else is said, and where that is from."""

    name: str
    recipe: Callable[[Setting], Recipe]
    published: Callable[[Setting], Recipe]
    steps: int
    steps_source: str


def defenses() -> dict[str, Defense]:
    """All defenses by name."""
    from fastguard.plan import published

    assumed = "assumed"
    known = (
        Defense("sft", sft, published.sft, 1000, assumed),
        Defense("repnoise", repnoise, published.repnoise, 2500, "10,000 pairs, batch 4"),
        Defense("tar", tar, published.tar, 750, "published"),
        Defense("booster", booster, published.booster, 1000, assumed),
        Defense("vaccine", vaccine, published.vaccine, 1000, assumed),
        Defense("t-vaccine", t_vaccine, published.t_vaccine, 1000, assumed),
    )
    return {d.name: d for d in known}
