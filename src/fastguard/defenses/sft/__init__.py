"""Plain supervised fine-tuning on refusals and ordinary answers: the control."""

from fastguard.methods.registry import Entry

ENTRY = Entry(
    name="sft",
    title="SFT",
    kind="defense",
    paper="",
    summary="Plain supervised fine-tuning on refusals and ordinary answers: the control.",
    method=f"{__name__}.step:SFT",
    options=f"{__name__}.options:Options",
    cost=f"{__name__}.cost:COST",
    steps=313,
    batch=32,
    tokens=256,
    steps_source="assumed: 10,000 samples, batch 32, 256 tokens",
    package=__name__,
)
