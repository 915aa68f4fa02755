"""CRL (Triplet): harmful states gather at their own mean, away from where they were; harmless ones stay."""

from fastguard.methods.registry import Entry

ENTRY = Entry(
    name="crl",
    title="CRL",
    kind="defense",
    paper="arXiv:2506.11938",
    summary="CRL (Triplet): harmful states gather at their own mean, away from where they were; harmless ones stay.",
    method=f"{__name__}.step:CRL",
    options=f"{__name__}.options:Options",
    cost=f"{__name__}.cost:COST",
    steps=1100,
    batch=16,
    tokens=512,
    steps_source="published port (TamperBench): 1,100 steps, batch 16, 512 tokens",
    package=__name__,
)
