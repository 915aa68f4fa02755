"""What a step of TAR costs, here and as published: see ``plan.cost``."""

from __future__ import annotations

from dataclasses import replace

from fastguard.defenses.tar.options import Options
from fastguard.plan import parts, passes
from fastguard.plan.cost import Cost, Recipe, moments_of
from fastguard.plan.parts import FP32, Item, Part, adamw, item, over_weights, resident
from fastguard.plan.passes import Work
from fastguard.plan.setting import Setting


def batches(s: Setting, o: Options) -> tuple[int, int]:
    """Sequences a GPU of an attacker's batch and of the held-out one.

    Published: 4 where retain batches have 8, so half of the global batch, and a held-out batch that is assumed to be
    whole. One that was given is a GPU's, as in a run. DPO's held-out batch is of pairs.
    """
    attacked = o.batch if "batch" in s.given else s.share(attackers_batch(s))
    held_out = o.held_out if "held_out" in s.given else s.batch
    return attacked, held_out * (2 if o.tamper_loss == "dpo" else 1)


def attackers_batch(s: Setting) -> int:
    """Sequences of an attacker's batch over all GPUs, as published."""
    return max(s.global_batch // 2, 1)


def attacker(s: Setting) -> Setting:
    """The job of an attacker's steps: what he trains, over how many GPUs, and how his gradients are reduced."""
    if s.adversary == "weights":
        return s if s.attack_reduce is None else replace(s, precision=replace(s.precision, reduce=s.attack_reduce))
    if s.lora is not None:
        raise ValueError(f"adversary: expected weights, those of the adapters that are trained, got {s.adversary}")
    return replace(s, lora=s.adversary_rank, gpus=node(s) if s.adversary == "resident" else s.gpus)


def of_options(s: Setting, o: Options) -> Setting:
    """The job with what a run's own options say of its attackers."""
    if o.adversary != "weights":
        s = replace(s, adversary=o.adversary, adversary_rank=o.adversary_rank)
    if o.persistent and not s.persistent:  # a lever that is pulled has a number of its own
        s = replace(s, persistent=True, fresh=o.fresh)
    return replace(s, attack_reduce=2) if o.bf16_reductions else s


def together(s: Setting, o: Options) -> int:
    """Attackers in one forward."""
    return o.adversaries if s.adversary == "lora" else 1


def node(s: Setting) -> int:
    """GPUs of a node."""
    return min(s.gpus, s.gpu.per_node)


def steps_of(s: Setting, o: Options) -> tuple[int, int]:
    """Steps of an attacker in one of the defender's, and how often the tamper loss is read in them."""
    steps = min(s.fresh, o.inner_steps) if s.persistent else o.inner_steps
    return steps, max(steps // o.read_every, 1)


def attacking(s: Setting, o: Options, count: int) -> Work:
    """An attacker's steps, ``count`` of them, and what he holds.

    One who trains the defender's weights lends them and puts them back; those who train adapters move no weight, and
    pass in one forward, from a copy of their start, on a base that is gathered for each pass or stays. Adapters are
    fp32 and whole on each GPU; that an all-reduce adds their gradients up is as many bytes as if they were gathered
    twice and reduced. One in each node has a node's part of the batch, on a base that is gathered for the attack. One
    who is kept from step to step waits, with his optimizer, where a snapshot does; what waits stays as it was until an
    attack has ended well.
    """
    his, w = attacker(s), s.precision.weights
    during = moments_of("attack", "tamper")
    if s.adversary == "resident":
        of_node = batches(s, o)[0] * node(s) if "batch" in s.given else -(-attackers_batch(s) * node(s) // s.gpus)
        work, items = passes.within_node(s, "attack", of_node, count)
        base = s.architecture.parameters * float(s.precision.compute)
        work.append(Part("base gathered into the nodes", "weights", 1, network=base * s.moved))
        items.append(item("base in the node", base / node(s), *during))
    else:
        work, items = passes.fused(his, "attack", batches(s, o)[0] * together(s, o), count / together(s, o))
    if s.adversary == "lora":
        his = replace(his, gpus=1)
        beside = o.adversaries - 1  # the first's are in the passes
        if o.gathered and s.gpus > 1:
            beside = o.adversaries
            base, runs = s.architecture.parameters * float(s.precision.compute), steps_of(s, o)[1]
            work = [replace(part, network=0.0) if part.kind == "model" else part for part in work]
            work.append(Part("base gathered up to a read", "weights", runs, network=runs * base * s.moved))
            items = [i for i in items if i.name != "gathered weights"] + [item("base", base, *moments_of("attack"))]
        added = beside * FP32 * 2 * his.trainable * s.moved
        work.append(Part("adapters added up", "weights", count / o.adversaries, network=added * count / o.adversaries))
        gradients = o.adversaries * his.shard * FP32 - his.shard / s.gpus * w
        items.append(item("attackers' gradients", gradients, *moments_of("attack")))
    held = together(s, o) * his.shard
    work.append(adamw(his, "inner AdamW", s.attack_moments, count))
    items.append(item("inner optimizer", 2 * held * s.attack_moments, *during))
    if s.adversary == "weights":
        work[:0] = [parts.snapshot(s).times(o.adversaries)]
        work.append(parts.restore(s).times(o.adversaries))
        items.append(parts.snapshot_item(s, *during))
    else:
        copies = 2 if s.adversary == "lora" else 1  # a snapshot is there
        items.append(item("attackers' adapters", copies * held * FP32, *during))
    if s.persistent and s.fresh < o.inner_steps:
        host, each = s.snapshot == "host", w + 2 * s.attack_moments
        there = 2 * each if host else 4 * each
        work.append(over_weights(his, "attackers who wait", there, o.adversaries, host_each=2 * each if host else 0))
        size = o.adversaries * his.shard * each
        items.append(Item("attackers who wait", size, host=host))
    return work, items


def through_adapters(s: Setting, samples: int, count: float) -> list[Part]:
    """What the attackers' adapters add to the passes that read the tamper loss: products, and no gradient of theirs.

    A layer that is computed again no longer stops before its last product, which is in front of an adapter.
    """
    if s.adversary != "lora":
        return []
    a, m = s.architecture, float(samples * s.tokens)
    each = 2 * m * a.adapter(s.adversary_rank) * (3 if s.checkpointing else 2)
    again = 2 * m * a.layers * a.down if s.checkpointing else 0.0
    return [Part("tamper: adapters", "model", 1, each + again).times(count)]


def here(s: Setting, o: Options) -> Recipe:
    """K steps of each simulated attacker; the tamper loss read at every n-th; then the retain loss at the original
    weights.

    The retain loss compares hidden states with those of the initial weights, which change places with the live ones for
    the length of a forward (LoRA: the adapter is switched off). DPO asks the initial weights too, before each attack.
    The tamper loss is read by FSDP2 wherever the attacker trains: its gradient is all weights'.
    """
    s = of_options(s, o)
    beside = together(s, o)
    held_out = batches(s, o)[1] * beside
    steps, reads = (o.adversaries * n for n in steps_of(s, o))
    reads //= beside
    attack, after = moments_of("attack", "tamper"), moments_of("reference", "retain")
    w, host = s.precision.weights, s.outer == "host"
    exchange = 4 * w if s.lora is None else 0  # there and back, both ways
    asked: list[Part] = []
    asked_items: list[Item] = []
    if o.tamper_loss == "dpo":
        name = "preferences of the reference"
        asked, asked_items = passes.fused(s, name, held_out, o.adversaries / beside, gradients="none", adapted=False)
        asked.append(over_weights(s, f"{name}: exchange", exchange, o.adversaries / beside, host_each=exchange))
    attacks, attacks_items = attacking(s, o, steps)
    tamper, tamper_items = passes.fused(s, "tamper", held_out, reads)
    retain, retain_items = passes.fused(s, "retain", s.batch, earlier=True)
    states = passes.hidden_states(s, s.batch)
    work = [
        *asked,
        *attacks,
        *tamper,
        *through_adapters(s, held_out, reads),
        parts.accumulate(s, "accumulate", reads),
        over_weights(s, "outer optimizer to the host and back", 0, host_each=4 * s.precision.moments if host else 0),
        over_weights(s, "exchange with the initial weights", exchange, host_each=exchange),
        *passes.run(s, "reference", s.batch, gradients="none", adapted=False),
        *retain,
        representation_distance(s),
        parts.outer_adamw(s),
    ]
    earlier = [item("gradients of the attacks before", s.shard * w, *attack)] if o.adversaries > beside else []
    return Recipe(
        [part for part in work if part.flops + part.memory + part.network + part.host > 0],
        [
            parts.weights_item(s),
            item("outer optimizer", parts.outer_bytes(s), *(after if host else ())),
            Item("outer optimizer", parts.outer_bytes(s) if host else 0.0, host=True),
            item("outer accumulator", s.shard * FP32, *attack),
            *earlier,
            Item("initial weights", s.shard * w if s.lora is None else 0.0, host=True),
            *asked_items,
            *attacks_items,
            *tamper_items,
            *passes.memory(s, "reference", s.batch, gradients="none"),
            *retain_items,
            Item("reference: hidden states", states, frozenset(after), host=s.reference == "host"),
        ],
        () if "batch" in s.given or s.adversary == "resident" else s.rounded("attackers' batch", attackers_batch(s)),
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
    """Reads live and reference states, reads them again in the backward, writes the live ones' gradient.

    States that wait on the host cross the bus there and, forth and back, twice again.
    """
    states = passes.hidden_states(s, s.batch)
    host = 3 * states if s.reference == "host" else 0.0
    return Part("representation distance", "weights", 1, memory=5 * states, host=host)


COST = Cost(here, published, divides=True)
