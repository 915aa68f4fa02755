"""Harmful fine-tuning of low-rank adapters."""

from fastguard.methods.registry import Entry

ENTRY = Entry(
    name="lora",
    title="LoRA fine-tuning",
    kind="attack",
    paper="arXiv:2310.20624",
    summary="Harmful fine-tuning of low-rank adapters.",
    method=f"{__name__}.step:LoRA",
    options=f"{__name__}.options:Options",
    cost=None,
    steps=1000,
    steps_source="assumed",
    package=__name__,
    alone=True,  # adapters that are put on a sharded model are nobody's shard
)
