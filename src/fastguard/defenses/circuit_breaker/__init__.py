"""Circuit breakers: harmful states turn away from where they were; harmless ones stay."""

from fastguard.methods.registry import Entry

ENTRY = Entry(
    name="circuit_breaker",
    title="Circuit breakers",
    kind="defense",
    paper="arXiv:2406.04313",
    summary="Circuit breakers (representation rerouting): harmful states turn away from where they were.",
    method=f"{__name__}.step:CircuitBreaker",
    options=f"{__name__}.options:Options",
    cost=f"{__name__}.cost:COST",
    steps=150,
    batch=16,
    tokens=1024,
    steps_source="published code: 150 steps, batch 16, 1,024 tokens",
    package=__name__,
)
