"""RSN-Tune: fine-tuning of the safety neurons that general text does not need."""

from fastguard.methods.registry import Entry

ENTRY = Entry(
    name="rsn_tune",
    title="RSN-Tune",
    kind="defense",
    paper="",
    summary="SN-Tune of the safety neurons that general text does not excite.",
    method=f"{__name__}.step:RSNTune",
    options=f"{__name__}.options:Options",
    cost=None,
    steps=2,
    steps_source="published run: 50 samples, batch 32",
    package=__name__,
)
