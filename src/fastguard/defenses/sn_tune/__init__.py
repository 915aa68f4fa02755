"""SN-Tune: fine-tuning of safety neurons alone."""

from fastguard.methods.registry import Entry

ENTRY = Entry(
    name="sn_tune",
    title="SN-Tune",
    kind="defense",
    paper="",
    summary="Fine-tuning on refusals of the neurons alone that all of them excite.",
    method=f"{__name__}.step:SNTune",
    options=f"{__name__}.options:Options",
    cost=None,
    steps=2,
    steps_source="published run: 50 samples, batch 32",
    package=__name__,
)
