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
    steps=318,
    batch=32,
    tokens=512,
    steps_source="10,150 samples, batch 32, 1 epoch (public re-implementation); 512 tokens assumed",
    package=__name__,
)
