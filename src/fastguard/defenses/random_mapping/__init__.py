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
    steps_source="published",
    package=__name__,
)
