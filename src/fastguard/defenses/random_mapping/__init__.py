"""Random Mapping: hidden states of harmful text point in random directions; TAR's preparation."""

from fastguard.methods.registry import Entry

ENTRY = Entry(
    name="random_mapping",
    title="Random Mapping",
    kind="defense",
    paper="arXiv:2408.00761",
    summary="Random Mapping: hidden states of harmful text point in random directions; TAR's preparation.",
    method=f"{__name__}.step:RandomMapping",
    options=f"{__name__}.options:Options",
    cost=f"{__name__}.cost:COST",
    steps=1000,
    batch=64,
    tokens=256,
    steps_source="1,000 steps; batch 64 and 256 tokens assumed, as TAR's",
    package=__name__,
)
