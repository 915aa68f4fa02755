"""ReFAT: refusals are trained while what refusal rests on is ablated from the stream."""

from fastguard.methods.registry import Entry

ENTRY = Entry(
    name="refat",
    title="ReFAT",
    kind="defense",
    paper="arXiv:2409.20089",
    summary="ReFAT: refusals are trained while what refusal rests on is ablated from the stream.",
    method=f"{__name__}.step:ReFAT",
    options=f"{__name__}.options:Options",
    cost=f"{__name__}.cost:COST",
    steps=320,
    steps_source="10,150 samples in batches of 32, one epoch (public re-implementation)",
    package=__name__,
)
