"""Booster: alignment that a step towards harm gains little from."""

from fastguard.methods.registry import Entry

ENTRY = Entry(
    name="booster",
    title="Booster",
    kind="defense",
    paper="arXiv:2409.01586",
    summary="Booster: alignment that a step towards harm gains little from.",
    method=f"{__name__}.step:Booster",
    options=f"{__name__}.options:Options",
    cost=f"{__name__}.cost:COST",
    steps=1000,
    steps_source="assumed",
    package=__name__,
)
