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
    steps=10000,
    batch=10,
    tokens=256,
    epochs=20,
    steps_source="batch 10, 20 epochs; 5,000 samples and 256 tokens assumed",
    package=__name__,
)
