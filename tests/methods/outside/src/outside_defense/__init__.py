"""Gradient ascent on harmful answers beside descent on safe ones: the simplest defense there is."""

from fastguard.methods.registry import Entry

ENTRY = Entry(
    name="gradient_ascent",
    title="Gradient ascent",
    kind="defense",
    paper="",
    summary="Ascent on harmful answers, descent on safe ones.",
    method="outside_defense.step:GradientAscent",
    options="outside_defense.options:Options",
    cost="outside_defense.cost:COST",
    steps=100,
    steps_source="this test",
    distribution="outside-defense",
)
