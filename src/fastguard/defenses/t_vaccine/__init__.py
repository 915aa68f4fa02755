"""T-Vaccine: Vaccine on a few layers at a time, the more harmful ones more often."""

from fastguard.methods.registry import Entry

ENTRY = Entry(
    name="t_vaccine",
    title="T-Vaccine",
    kind="defense",
    paper="arXiv:2410.09760",
    summary="T-Vaccine: Vaccine on a few layers at a time, the more harmful ones more often.",
    method=f"{__name__}.step:TVaccine",
    options=f"{__name__}.options:Options",
    cost=f"{__name__}.cost:COST",
    steps=10000,
    batch=10,
    tokens=256,
    epochs=20,
    steps_source="batch 10, 20 epochs; 5,000 samples and 256 tokens assumed",
    package=__name__,
)
