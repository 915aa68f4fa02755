"""Harmful fine-tuning of all weights."""

from fastguard.methods.registry import Entry

ENTRY = Entry(
    name="harmful_finetuning",
    title="harmful fine-tuning",
    kind="attack",
    paper="arXiv:2310.03693",
    summary="Harmful fine-tuning of all weights.",
    method=f"{__name__}.step:HarmfulFinetuning",
    options=f"{__name__}.options:Options",
    cost=None,
    steps=1000,
    steps_source="assumed",
    package=__name__,
)
