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
    steps=1000,
    steps_source="assumed",
    package=__name__,
)
