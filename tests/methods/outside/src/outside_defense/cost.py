from fastguard.plan import parts, passes
from fastguard.plan.cost import Cost, Recipe


def here(s, options):
    """Two passes, one after the other."""
    n = s.batch * s.tokens
    steps, items = [], [*parts.resident(s)]
    for name, earlier in (("harmful", False), ("harmless", True)):
        steps += [*passes.run(s, name, s.batch), passes.fused_head(s, f"{name}: head", n)]
        items += [*passes.memory(s, name, s.batch, earlier=earlier), *passes.fused_items(s, name, n)]
    return Recipe([*steps, parts.outer_adamw(s)], items)


COST = Cost(here, here)
