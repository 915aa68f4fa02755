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
    steps=10000,
    batch=10,
    tokens=256,
    epochs=20,
    steps_source="assumed, as T-Vaccine's: batch 10, 20 epochs, 5,000 samples, 256 tokens",
    package=__name__,
)
