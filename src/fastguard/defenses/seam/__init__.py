"""SEAM: learning the harmful answers is made to unlearn the harmless ones."""

from fastguard.methods.registry import Entry

ENTRY = Entry(
    name="seam",
    title="SEAM",
    kind="defense",
    paper="arXiv:2505.12186",
    summary="SEAM: learning the harmful answers is made to unlearn the harmless ones.",
    method=f"{__name__}.step:SEAM",
    options=f"{__name__}.options:Options",
    cost=f"{__name__}.cost:COST",
    steps=2000,
    batch=4,
    tokens=256,
    steps_source="8,000 pairs, batch 4, 256 tokens, 1 epoch",
    package=__name__,
)
