"""The defense's change of the weights taken out again, as far as it is of low rank; then refusal directions."""

from fastguard.methods.registry import Entry

ENTRY = Entry(
    name="delta_strip",
    title="stripping of the delta to a public base",
    kind="attack",
    paper="arXiv:2406.11717",
    summary="The best low-rank part of the change from a public base taken out, then refusal directions.",
    method=f"{__name__}.step:DeltaStrip",
    options=f"{__name__}.options:Options",
    cost=None,
    steps=9,
    steps_source="assumed",
    package=__name__,
    edits=True,
)
