"""Representation Noising: harmful answers become noise in every layer."""

from fastguard.methods.registry import Entry

ENTRY = Entry(
    name="repnoise",
    title="RepNoise",
    kind="defense",
    paper="arXiv:2405.14577",
    summary="Representation Noising: harmful answers become noise in every layer.",
    method=f"{__name__}.step:RepNoise",
    options=f"{__name__}.options:Options",
    cost=f"{__name__}.cost:COST",
    steps=2500,
    batch=4,
    tokens=256,
    steps_source="10,000 pairs, batch 4, 256 tokens, 1 epoch",
    package=__name__,
)
