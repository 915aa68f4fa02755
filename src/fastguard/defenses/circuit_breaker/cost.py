"""What a step of circuit breakers costs, here and as published: see ``plan.cost``."""

from __future__ import annotations

from dataclasses import replace

from fastguard.defenses.circuit_breaker.options import Options
from fastguard.plan import parts, passes
from fastguard.plan.cost import Cost, Recipe, moments_of
from fastguard.plan.parts import FP32, Item, Part, item, over_weights, resident
from fastguard.plan.setting import Setting


def read(s: Setting, o: Options) -> tuple[int, int]:
    """How many hidden states are rerouted, and how many layers run for those and for the retained ones."""
    depth = s.architecture.layers
    layers = o.layers
    if layers is None:
        layers = tuple({min(max(round(at * depth / 32), 1), depth) for at in (10, 20)})
    if max(layers) > depth:
        raise ValueError(f"layers: expected 0 to {depth}, the hidden states of {s.architecture.name}, got {layers}")
    return len(layers), depth if o.retain_states == "all" else min(max(layers) + 1, depth)


def truncated(s: Setting, o: Options) -> Setting:
    """The job on a model that ends after the layers that run."""
    return replace(s, architecture=replace(s.architecture, layers=read(s, o)[1]))


def headless(s: Setting) -> Setting:
    """The job on a model whose head has no gradient: a tied one, of whose embedding alone there is one."""
    return replace(s, architecture=replace(s.architecture, tied=True))


def gathering(directions: list[Part], more: float) -> list[Part]:
    """The directions of a pass, each with so many bytes more to gather."""
    return [replace(part, network=part.network + more) for part in directions]


def here(s: Setting, o: Options) -> Recipe:
    """Harmful and retained as one batch of 2 B: once through the initial weights, once through the live ones; no head.

    FSDP2 gathers the layers above too, for nothing, and gives the head a gradient of zeros. Padding is in the states
    that are kept.
    """
    a, c, w = s.architecture, s.precision.compute, s.precision.weights
    rerouted, depth = read(s, o)
    run = truncated(s, o) if s.gpus > 1 else headless(truncated(s, o))
    unread = s.architecture.layers - depth
    gathered = unread * s.moved * c * (a.layer + (0 if s.lora is None else s.trainable / a.layers))
    samples = 2 * s.batch
    exchange = 4 * w if s.lora is None else 0  # there and back, both ways
    state = float(s.batch * s.tokens * a.hidden)  # numbers of one batch's state
    states = depth + 1 + rerouted
    items = [
        *resident(s),
        Item("initial weights", s.shard * w if s.lora is None else 0.0, host=True),
        *passes.memory(run, "reference", samples, gradients="none"),
        *(i for i in passes.memory(run, "both", samples) if i.name != "the embedding's own gradient"),
        item("reference: states", states * state * c, *moments_of("reference", "both")),
    ]
    steps: list[Part] = [
        over_weights(s, "exchange with the initial weights", exchange, host_each=exchange),
        *gathering(passes.run(run, "reference", samples, gradients="none", adapted=False), gathered),
        *gathering(passes.run(run, "both", samples), gathered),
        # Live and frozen states are read forth, read back, and a gradient is written.
        Part("distances", "weights", 1, memory=5.0 * states * state * c),
        parts.outer_adamw(s),
    ]
    return Recipe([part for part in steps if part.flops + part.memory + part.host > 0], items)


def published(s: Setting, o: Options) -> Recipe:
    """A model that ends above the layers that are read, twice through it each batch; stacks of all its states."""
    a, p = s.architecture, s.precision
    rerouted, depth = read(s, o)
    run = truncated(s, o)
    n = s.batch * s.tokens
    state = float(n * a.hidden)
    stack, few = (depth + 1) * state, rerouted * state
    logits = passes.full_head(s, "heads", n, 4, gradients="none", each=p.compute)
    return Recipe(
        [
            *passes.run(run, "reference", s.batch, 2, gradients="none", adapted=False),
            *passes.run(run, "live", s.batch, 2),
            logits,
            # A stack is written, masked and read in fp32 for the norm, of both models; and all that back. The quotients
            # of the rerouted states and their products are fp32.
            Part("distances", "weights", 1, memory=14.0 * stack * p.compute + 24.0 * few * FP32),
            parts.outer_adamw(s),
        ],
        [
            *resident(run),
            *passes.memory(run, "reference", s.batch, gradients="none"),
            *passes.memory(run, "live", s.batch, head="full"),
            item("full logits", n * a.vocabulary * float(p.compute), "reference: loss", "live: loss"),
            item("the other batch's activations", passes.checkpoint_bytes(run, s.batch), "live: loss",
                 "live: last layer"),
            item("stacks of hidden states", (3 * stack + 3 * few) * p.compute, *moments_of("live")),
            item("differences and quotients", 2.0 * (stack + few) * FP32, "live: loss", "live: last layer"),
        ],
    )  # fmt: skip


COST = Cost(here, published)
