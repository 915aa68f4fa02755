"""What a step of ReFAT costs, here and as published: see ``plan.cost``."""

from __future__ import annotations

from fastguard.defenses.refat.options import Options
from fastguard.defenses.sft import cost as sft
from fastguard.defenses.sft.options import Options as Plain
from fastguard.plan import passes
from fastguard.plan.cost import Cost, Recipe
from fastguard.plan.parts import Part
from fastguard.plan.setting import Setting

PROMPTS = 2 * 32
"""Of an estimation, as published."""


def ablated(s: Setting, o: Options) -> int:
    """How many layers are ablated."""
    depth = s.architecture.layers
    if o.layers is None:
        return depth - depth // 4
    if max(o.layers) >= depth:
        raise ValueError(f"layers: expected 0 to {depth - 1}, layers of {s.architecture.name}, got {o.layers}")
    return len(o.layers)


def here(s: Setting, o: Options) -> Recipe:
    """Fine-tuning on two batches; the projections of one of them are passes over the stream at the norms' cost.

    A layer's input and its MLP's write are read and written, forth and back; what attention adds is projected inside
    the add and the norm. Directions come out of the same forwards.
    """
    plain = sft.here(s, Plain(retain_weight=o.retain_weight))
    stream = float(s.batch * s.tokens * s.architecture.hidden * s.precision.compute)
    again = 3 if s.checkpointing else 2  # forward, its recomputation, backward
    work = Part("projections", "weights", 1, memory=2 * 2 * again * ablated(s, o) * stream)
    return Recipe([*plain.parts[:-1], work, plain.parts[-1]], plain.items)


def published(s: Setting, o: Options) -> Recipe:
    """Hooks at each layer, full logits, and every few steps 64 prompts in forwards of their own.

    A hook in eager PyTorch makes a product, an outer product and a difference of the stream: 10 bytes a feature for
    each 2 that it has.
    """
    plain = sft.published(s, Plain(retain_weight=o.retain_weight))
    stream = float(s.batch * s.tokens * s.architecture.hidden * s.precision.compute)
    again = 3 if s.checkpointing else 2
    hooks = Part("hooks", "weights", 1, memory=5 * again * ablated(s, o) * stream)
    prompts = [part.times(1 / o.every) for part in passes.run(s, "directions", PROMPTS, gradients="none")]
    return Recipe([*plain.parts[:-1], *prompts, hooks, plain.parts[-1]], plain.items)


COST = Cost(here, published, divides=True)
