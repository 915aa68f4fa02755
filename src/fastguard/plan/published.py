"""What one step of each defense consists of in the published code, on the same GPUs.

The published programs are given the same sharding, kernels and precision; what differs is what their algorithm asks
for: full logits, second models, copies of gradients and weights, captured activations. A difference between the two is
one of algorithms, not of tuning.
"""

from __future__ import annotations

from fastguard.plan import parts, passes
from fastguard.plan.defenses import Recipe, moments_of
from fastguard.plan.parts import FP32, Part, adamw, item, over_weights, resident
from fastguard.plan.setting import Setting


def sft(s: Setting) -> Recipe:
    """Cross-entropy on full logits, as transformers computes it."""
    n = s.batch * s.tokens
    return Recipe(
        [*passes.run(s, "step", s.batch), passes.full_head(s, "step: head", n), parts.outer_adamw(s)],
        [*resident(s), *passes.memory(s, "step", s.batch, head="full"), *passes.full_items(s, "step", n)],
    )


def repnoise(s: Setting) -> Recipe:
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


def tar(s: Setting) -> Recipe:
    """Parameters cloned to the host, the outer optimizer's state moved there, a frozen second model, full logits."""
    reads = s.inner_steps / s.read_every
    w, p = s.precision.weights, s.precision
    n, attacked = s.batch * s.tokens, s.adversary * s.tokens
    attack = moments_of("attack", "tamper")
    weights, optimizer = resident(s)
    after = moments_of("reference", "retain")
    entropy = 20.0  # softmax and log-softmax kept, their product, a gradient of each: fp32
    return Recipe(
        [
            over_weights(s, "clone to the host", w, host_each=w),
            over_weights(s, "outer optimizer to the host", 2 * p.moments, host_each=2 * p.moments),
            *passes.run(s, "attack", s.adversary, s.inner_steps),
            passes.full_head(s, "attack: head", attacked, s.inner_steps),
            adamw(s, "inner AdamW", p.moments, s.inner_steps),
            *passes.run(s, "tamper", s.batch, reads),
            passes.full_head(s, "tamper: head", n, reads, each=5 * p.compute + 52),
            parts.accumulate(s, "accumulate", reads, accumulator=w),
            over_weights(s, "restore from the host", w, host_each=w),
            over_weights(s, "outer optimizer back", 2 * p.moments, host_each=2 * p.moments),
            *passes.run(s, "reference", s.batch, gradients="none"),
            passes.full_head(s, "reference: head", n, gradients="none", each=p.compute),
            *passes.run(s, "retain", s.batch),
            passes.full_head(s, "retain: head", n),
            # Per state: difference, its norm and the backward, each written and read.
            Part("representation distance", "weights", 1, memory=8 * passes.hidden_states(s, s.batch)),
            parts.outer_adamw(s),
        ],
        [
            weights,
            item(optimizer.name, optimizer.bytes, *after),
            item("inner optimizer", 2 * s.shard * p.moments, *attack),
            item("outer accumulator", s.shard * w),
            item("reference: second model", s.architecture.parameters / s.gpus * w),
            *passes.memory(s, "attack", s.adversary, head="full"),
            *passes.full_items(s, "attack", attacked),
            *passes.memory(s, "tamper", s.batch, head="full"),
            *passes.full_items(s, "tamper", n, entropy),
            *passes.memory(s, "reference", s.batch, gradients="none"),
            item("full logits", n * s.architecture.vocabulary * float(p.compute), "reference: loss"),
            *passes.memory(s, "retain", s.batch, head="full"),
            *passes.full_items(s, "retain", n),
            item("reference: hidden states", passes.hidden_states(s, s.batch), *after),
            # The difference to each of them, kept for the backward of its norm.
            item("differences of the states", passes.hidden_states(s, s.batch), *moments_of("retain")),
        ],
    )


def booster(s: Setting) -> Recipe:
    """Three passes on full logits; both harmful gradients copied; the step taken back by adding, without a snapshot."""
    w, n = s.precision.weights, s.batch * s.tokens
    steps: list[Part] = []
    items = [
        *resident(s),
        item("stored gradient, harmful", s.shard * w, *moments_of("perturbed", "alignment")),
        item("stored gradient, perturbed", s.shard * w, *moments_of("alignment")),
    ]
    for name in ("harmful", "perturbed", "alignment"):
        steps += [*passes.run(s, name, s.batch), passes.full_head(s, f"{name}: head", n)]
        items += [*passes.memory(s, name, s.batch, head="full"), *passes.full_items(s, name, n)]
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


def _vaccine(s: Setting, layers: float, probe: float) -> Recipe:
    """Two full forward+backward passes: the recording one computes the weights' gradients too, and drops them."""
    a, c, n = s.architecture, s.precision.compute, s.batch * s.tokens
    each = layers * n * a.hidden * float(c)
    steps: list[Part] = []
    items = [*resident(s)]
    for name in ("recording", "perturbed"):
        steps += [*passes.run(s, name, s.batch), passes.full_head(s, f"{name}: head", n)]
        items += [*passes.memory(s, name, s.batch, head="full"), *passes.full_items(s, name, n)]
    if probe:
        steps += [*passes.run(s, "probing", 1, probe), passes.full_head(s, "probing: head", s.tokens, probe)]
    # Gradients are cloned, scaled into a second copy, and added.
    steps += [Part("perturbation of the activations", "weights", 1, memory=8 * each), parts.outer_adamw(s)]
    items.append(item("activation gradients and perturbation", 2 * each, "recording: first layer"))
    items.append(item("activation perturbation", each, *moments_of("perturbed")))
    return Recipe(steps, items)


def vaccine(s: Setting) -> Recipe:
    """On all layers."""
    return _vaccine(s, s.architecture.layers, 0)


def t_vaccine(s: Setting) -> Recipe:
    """On S of L layers, and a probing pass."""
    return _vaccine(s, min(s.perturbed_layers, s.architecture.layers), 1 / s.probe_every)
