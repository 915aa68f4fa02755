"""What a step of CRL costs, here and as published: see ``plan.cost``."""

from __future__ import annotations

from dataclasses import replace

from fastguard.defenses.crl.options import Options
from fastguard.plan import parts, passes
from fastguard.plan.cost import Cost, Recipe, moments_of
from fastguard.plan.parts import FP32, Item, Part, item, over_weights, resident
from fastguard.plan.setting import Setting


def read(s: Setting, o: Options) -> int:
    """How many hidden states are read."""
    depth = s.architecture.layers
    if o.layers is None:
        return max(depth - max(5 * depth // 8, 1), 1)
    if max(o.layers) > depth:
        raise ValueError(f"layers: expected 0 to {depth}, the hidden states of {s.architecture.name}, got {o.layers}")
    return len(o.layers)


def here(s: Setting, o: Options) -> Recipe:
    """Harmful and harmless as one batch of 2 B: once through the initial weights, once through the live ones.

    Every token is one of a response: nothing is known of the prompts' share.
    """
    a, c, w = s.architecture, s.precision.compute, s.precision.weights
    rows, samples, layers = s.batch * s.tokens, 2 * s.batch, read(s, o)
    exchange = 4 * w if s.lora is None else 0  # there and back, both ways
    state = 2 * rows * a.hidden  # numbers of both batches' response tokens at one state
    wide = 0 if c == FP32 else FP32
    items: list[Item] = [
        *resident(s),
        Item("initial weights", s.shard * w if s.lora is None else 0.0, host=True),
        *passes.memory(s, "reference", samples, gradients="none"),
        *passes.memory(s, "pair", samples),
        *passes.fused_items(replace(s, keep_logits_bytes=0), "pair", rows),
        item("reference: response states", float((layers + 1) * state * c), *moments_of("reference", "pair")),
        item("response states", float(layers * state * (c + wide)), "pair: loss", "pair: last layer"),
    ]
    if s.lora is None:
        items.append(item("reference: head", float(a.head * c), *moments_of("pair")))
    steps: list[Part] = [
        over_weights(s, "exchange with the initial weights", exchange, host_each=exchange),
        *passes.run(s, "reference", samples, gradients="none", adapted=False),
        *passes.run(s, "pair", samples),
        divergence(s, rows),
        # Live and frozen rows are gathered and read forth, read back, and a gradient is written.
        Part("hinges", "weights", 1, memory=7.0 * layers * state * c),
        parts.outer_adamw(s),
    ]
    return Recipe([part for part in steps if part.flops + part.memory + part.host > 0], items)


def divergence(s: Setting, rows: float) -> Part:
    """Two products forth, both again and the student's two gradients back: 12 N D V where a cross-entropy has 8.

    A frozen head has one gradient: 10 N D V, and 6 on a CPU, which makes it in the forward while it has the logits.
    """
    early = replace(s, late_head=False, keep_logits_bytes=0)  # gathered as its shards are; keeps no logits
    part = passes.fused_head(early, "divergence", rows, 1.5)
    if s.lora is None:  # the reference's head is there after its forward: the live one alone is gathered and reduced
        return replace(part, network=part.network / 1.5)
    return replace(part, flops=(6.0 if s.cpu else 10.0) * rows * s.architecture.head)


def published(s: Setting, o: Options) -> Recipe:
    """A second model, the harmless batch twice through each, stacks of states in fp32, full logits of all of them."""
    a, p = s.architecture, s.precision
    n, layers = s.batch * s.tokens, read(s, o)
    stack = float(layers * n * a.hidden * FP32)
    again = ("harmful", "harmless")
    kept = passes.checkpoint_bytes(s, s.batch)
    return Recipe(
        [
            *passes.run(s, "reference", s.batch, 3, gradients="none"),
            passes.full_head(s, "reference: head", n, 3, gradients="none", each=p.compute),
            *passes.run(s, "live", s.batch, 3),
            passes.full_head(s, "harmful, harmless: heads", n, 2, gradients="none", each=p.compute),
            passes.full_head(s, "divergence", n),
            # Four stacks are written; the distances read them, write products and quotients, and all that back.
            Part("hinges", "weights", 1, memory=24 * stack),
            parts.outer_adamw(s),
        ],
        [
            *resident(s),
            item("reference: second model", a.parameters / s.gpus * p.weights),
            *passes.memory(s, "reference", s.batch, gradients="none"),
            item("full logits", n * a.vocabulary * float(p.compute), "reference: loss"),
            *passes.memory(s, "live", s.batch, head="full"),
            # The logits of both models in fp32, their softmax and log-softmax, and a gradient.
            *passes.full_items(s, "live", n, 20.0),
            item("the other forwards' activations", len(again) * kept, "live: loss", "live: last layer"),
            item("stacks of hidden states", 4 * stack, "live: loss", "live: last layer"),
            item("products and quotients of the stacks", 4 * stack, "live: loss"),
        ],
    )


COST = Cost(here, published)
