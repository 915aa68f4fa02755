"""Tamper-Resistant Safeguards: trained against simulated fine-tuning attacks."""

from fastguard.methods.registry import Entry

ENTRY = Entry(
    name="tar",
    title="TAR",
    kind="defense",
    paper="arXiv:2408.00761",
    summary="Tamper-Resistant Safeguards: trained against simulated fine-tuning attacks.",
    method=f"{__name__}.step:TAR",
    options=f"{__name__}.options:Options",
    cost=f"{__name__}.cost:COST",
    steps=750,
    batch=64,
    tokens=256,
    steps_source="run_tar_cyber.sh: 750 steps, batch 8 on each of 8 GPUs, 256 tokens",
    package=__name__,
)
