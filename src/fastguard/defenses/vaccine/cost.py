"""What a step of Vaccine costs, here and as published: see ``plan.cost``."""

from __future__ import annotations

from fastguard.defenses.vaccine.options import Options
from fastguard.plan import parts, passes
from fastguard.plan.cost import Cost, Recipe, moments_of
from fastguard.plan.parts import Part, item, resident
from fastguard.plan.setting import Setting


def perturbed(s: Setting, layers: float, probe: float) -> Recipe:
    """Activations perturbed in so many layers, and a probing pass of the same kind ``probe`` times a step.

    The length of a perturbation is one of the whole batch: micro-batches are all recorded, then all perturbed.
    """
    a, c, n = s.architecture, s.precision.compute, s.batch * s.tokens
    # The lowest of S layers drawn from L without replacement is on average layer (L - S) / (S + 1).
    lowest = (a.layers - layers) / (layers + 1)
    recording, recorded = passes.fused(s, "recording", s.batch, gradients="activations", stop=lowest)
    second, held = passes.fused(s, "perturbed", s.batch)
    steps = [*recording, *second]
    if probe:
        steps += passes.run(s, "probing", 1, probe, gradients="activations", stop=0)
        steps.append(passes.fused_head(s, "probing: head", s.tokens, probe, gradients="activations"))
    each = layers * n * a.hidden * c
    steps += [Part("perturbation of the activations", "weights", 1, memory=6 * each), parts.outer_adamw(s)]
    return Recipe(
        steps,
        [
            *resident(s),
            *recorded,
            *held,
            item("activation perturbation", each, "recording: first layer", *moments_of("perturbed")),
        ],
    )


def perturbed_as_published(s: Setting, layers: float, probe: float) -> Recipe:
    """Two full forward+backward passes: the recording one computes the weights' gradients too, and drops them."""
    a, c, n = s.architecture, s.precision.compute, s.batch * s.tokens
    each = layers * n * a.hidden * float(c)
    steps: list[Part] = []
    items = [*resident(s)]
    for name in ("recording", "perturbed"):
        work, held = passes.full(s, name, s.batch)
        steps += work
        items += held
    if probe:
        steps += [*passes.run(s, "probing", 1, probe), passes.full_head(s, "probing: head", s.tokens, probe)]
    # Gradients are cloned, scaled into a second copy, and added.
    steps += [Part("perturbation of the activations", "weights", 1, memory=8 * each), parts.outer_adamw(s)]
    items.append(item("activation gradients and perturbation", 2 * each, "recording: first layer"))
    items.append(item("activation perturbation", each, *moments_of("perturbed")))
    return Recipe(steps, items)


def here(s: Setting, o: Options) -> Recipe:
    """Two passes: one that records gradients of the attention outputs and no weight's, one with them added."""
    return perturbed(s, s.architecture.layers, 0)


def published(s: Setting, o: Options) -> Recipe:
    """On all layers."""
    return perturbed_as_published(s, s.architecture.layers, 0)


COST = Cost(here, published, divides=True)
