"""Vaccine: alignment under the worst shift of every attention block."""

from fastguard.methods.registry import Entry

ENTRY = Entry(
    name="vaccine",
    title="Vaccine",
    kind="defense",
    paper="arXiv:2402.01109",
    summary="Vaccine: alignment under the worst shift of every attention block.",
    method=f"{__name__}.step:Vaccine",
    options=f"{__name__}.options:Options",
    cost=f"{__name__}.cost:COST",
    steps=1000,
    steps_source="assumed",
    package=__name__,
)
