"""Safety-critical weights that no fine-tuning moves."""

from fastguard.methods.registry import Entry

ENTRY = Entry(
    name="safety_freezing",
    title="Freezing of safety-critical weights",
    kind="defense",
    paper="arXiv:2402.05162",
    summary="Weights that safety needs and utility does not are frozen while somebody fine-tunes.",
    method=f"{__name__}.step:SafetyFreezing",
    options=f"{__name__}.options:Options",
    cost=None,
    steps=1,
    steps_source="published",
    package=__name__,
    edits=True,
    stage="during",
)
