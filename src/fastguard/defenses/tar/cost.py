"""What a step of TAR costs, here and as published: see ``plan.cost``."""

from __future__ import annotations

from fastguard.defenses.tar.options import Options
from fastguard.plan import parts, passes
from fastguard.plan.cost import Cost, Recipe, moments_of
from fastguard.plan.parts import FP32, Item, Part, adamw, item, over_weights, resident
from fastguard.plan.setting import Setting


def batches(s: Setting, o: Options) -> tuple[int, int]:
    """Sequences a GPU of an attacker's batch and of the held-out one.

    Published: 4 where retain batches have 8, so half of ``s.batch``, and a held-out batch that is assumed to be whole.
    One that was given is as it is in a run. DPO's held-out batch is of pairs.
    """
    attacked = o.batch if "batch" in s.given else max(s.batch // 2, 1)
    held_out = o.held_out if "held_out" in s.given else s.batch
    return attacked, held_out * (2 if o.tamper_loss == "dpo" else 1)


def here(s: Setting, o: Options) -> Recipe:
    """K steps of each simulated attacker; the tamper loss read at every n-th; then the retain loss at the original
    weights.

    The retain loss compares hidden states with those of the initial weights, which change places with the live ones for
    the length of a forward (LoRA: the adapter is switched off). DPO asks the initial weights too, before each attack.
    """
    adversary, held_out = batches(s, o)
    attackers, inner = o.adversaries, o.adversaries * o.inner_steps
    reads = o.adversaries * (o.inner_steps // o.read_every)
    n, attacked, tampered = s.batch * s.tokens, adversary * s.tokens, held_out * s.tokens
    attack = moments_of("attack", "tamper")
    w = s.precision.weights
    exchange = 4 * w if s.lora is None else 0  # there and back, both ways
    asked: list[Part] = []
    asked_items: list[Item] = []
    if o.tamper_loss == "dpo":
        name = "preferences of the reference"
        asked = [
            over_weights(s, f"{name}: exchange", exchange, attackers, host_each=exchange),
            *passes.run(s, name, held_out, attackers, gradients="none", adapted=False),
            passes.fused_head(s, f"{name}: head", tampered, attackers, gradients="none"),
        ]
        asked_items = passes.memory(s, name, held_out, gradients="none")
    steps = [
        *asked,
        parts.snapshot(s).times(attackers),
        *passes.run(s, "attack", adversary, inner),
        passes.fused_head(s, "attack: head", attacked, inner),
        adamw(s, "inner AdamW", FP32, inner),
        *passes.run(s, "tamper", held_out, reads),
        passes.fused_head(s, "tamper: head", tampered, reads),
        parts.accumulate(s, "accumulate", reads),
        parts.restore(s).times(attackers),
        over_weights(s, "exchange with the initial weights", exchange, host_each=exchange),
        *passes.run(s, "reference", s.batch, gradients="none", adapted=False),
        *passes.run(s, "retain", s.batch),
        passes.fused_head(s, "retain: head", n),
        representation_distance(s),
        parts.outer_adamw(s),
    ]
    initial = s.shard * w if s.lora is None else 0.0
    earlier = [item("gradients of the attacks before", s.shard * w, *attack)] if attackers > 1 else []
    return Recipe(
        [part for part in steps if part.flops + part.memory + part.host > 0],
        [
            *resident(s),
            item("inner optimizer", 2 * s.shard * FP32, *attack),
            parts.snapshot_item(s, *attack),
            item("outer accumulator", s.shard * FP32, *attack),
            *earlier,
            Item("initial weights", initial, host=True),
            *asked_items,
            *passes.memory(s, "attack", adversary),
            *passes.fused_items(s, "attack", attacked),
            *passes.memory(s, "tamper", held_out),
            *passes.fused_items(s, "tamper", tampered),
            *passes.memory(s, "reference", s.batch, gradients="none"),
            *passes.memory(s, "retain", s.batch, earlier=True),
            *passes.fused_items(s, "retain", n),
            item("reference: hidden states", passes.hidden_states(s, s.batch), *moments_of("reference", "retain")),
        ],
    )


def published(s: Setting, o: Options) -> Recipe:
    """Parameters cloned to the host, the outer optimizer's state moved there, a frozen second model, full logits."""
    adversary, held_out = batches(s, o)
    attackers, inner = o.adversaries, o.adversaries * o.inner_steps
    reads = o.adversaries * (o.inner_steps // o.read_every)
    w, p = s.precision.weights, s.precision
    n, attacked, tampered = s.batch * s.tokens, adversary * s.tokens, held_out * s.tokens
    attack = moments_of("attack", "tamper")
    weights, optimizer = resident(s)
    after = moments_of("reference", "retain")
    dpo = o.tamper_loss == "dpo"
    # Of the entropy softmax and log-softmax are kept, then their product, a gradient of each: fp32. DPO: the default.
    each, moved = (12.0, None) if dpo else (20.0, 5 * p.compute + 52.0)
    asked: list[Part] = []
    if dpo:
        name = "preferences of the reference"
        asked = [
            *passes.run(s, name, held_out, attackers, gradients="none"),
            passes.full_head(s, f"{name}: head", tampered, attackers, gradients="none"),
        ]
    return Recipe(
        [
            *asked,
            over_weights(s, "clone to the host", w, attackers, host_each=w),
            over_weights(s, "outer optimizer to the host", 2 * p.moments, host_each=2 * p.moments),
            *passes.run(s, "attack", adversary, inner),
            passes.full_head(s, "attack: head", attacked, inner),
            adamw(s, "inner AdamW", p.moments, inner),
            *passes.run(s, "tamper", held_out, reads),
            passes.full_head(s, "tamper: head", tampered, reads, each=moved),
            parts.accumulate(s, "accumulate", reads, accumulator=w),
            over_weights(s, "restore from the host", w, attackers, host_each=w),
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
            *passes.memory(s, "attack", adversary, head="full"),
            *passes.full_items(s, "attack", attacked),
            *passes.memory(s, "tamper", held_out, head="full"),
            *passes.full_items(s, "tamper", tampered, each),
            *passes.memory(s, "reference", s.batch, gradients="none"),
            item("full logits", n * s.architecture.vocabulary * float(p.compute), "reference: loss"),
            *passes.memory(s, "retain", s.batch, head="full"),
            *passes.full_items(s, "retain", n),
            item("reference: hidden states", passes.hidden_states(s, s.batch), *after),
            # The difference to each of them, kept for the backward of its norm.
            item("differences of the states", passes.hidden_states(s, s.batch), *moments_of("retain")),
        ],
    )


def representation_distance(s: Setting) -> Part:
    """Reads live and reference states, reads them again in the backward, writes the live ones' gradient."""
    return Part("representation distance", "weights", 1, memory=5 * passes.hidden_states(s, s.batch))


COST = Cost(here, published)
