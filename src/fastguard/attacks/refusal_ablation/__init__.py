"""Refusal directions cut out of the residual stream, found afresh on the model under attack."""

from fastguard.methods.registry import Entry

ENTRY = Entry(
    name="refusal_ablation",
    title="ablation of refusal directions",
    kind="attack",
    paper="arXiv:2406.11717",
    summary="Ablation of refusal directions, one more each round.",
    method=f"{__name__}.step:RefusalAblation",
    options=f"{__name__}.options:Options",
    cost=None,
    steps=8,
    steps_source="assumed",
    package=__name__,
    edits=True,
)
