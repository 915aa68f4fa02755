"""Antidote: weights that harmful answers rest on, set to 0 after fine-tuning."""

from fastguard.methods.registry import Entry

ENTRY = Entry(
    name="antidote",
    title="Antidote",
    kind="defense",
    paper="arXiv:2408.09600",
    summary="Weights that harmful answers rest on are set to 0, once, after fine-tuning.",
    method=f"{__name__}.step:Antidote",
    options=f"{__name__}.options:Options",
    cost=None,
    steps=1,
    steps_source="published",
    package=__name__,
    edits=True,
    stage="after",
)
