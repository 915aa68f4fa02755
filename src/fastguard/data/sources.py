"""Where data come from, as the document of a run tells it. Free of torch."""

from __future__ import annotations

from typing import TypedDict


class Split(TypedDict):
    """How much data a part of the run was given."""

    prompts: int
    clusters: int | None  # similarity clusters; None where the set is not clustered


class DataSource(TypedDict):
    """One data set, what was read of it, and how it was divided."""

    source: str  # package and file, or path
    licence: str
    fingerprint: str | None  # sha256 of the file, or the fingerprint of `datasets`; None: named by its package
    rows: int  # read
    dropped: dict[str, int]  # by reason
    cut: int  # answers that were longer than their limit
    splits: dict[str, Split]  # by name: align, immunize, attack, measure, ...


def left_out(one: DataSource) -> str:
    """What was dropped of a set and why, and how many answers were cut; empty where nothing was."""
    said = [f"{reason} {count}" for reason, count in one["dropped"].items()]
    return ", ".join(said + ([f"answers cut {one['cut']}"] if one["cut"] else []))


def describe(sources: dict[str, DataSource]) -> list[str]:
    """One line a set: what was read, what was dropped and why, what became of the rest."""
    lines = []
    for role, one in sources.items():
        parts = ", ".join(f"{part} {split['prompts']}" for part, split in one["splits"].items())
        lines.append(f"{role}: {one['source']}: {one['rows']} rows; left out: {left_out(one) or 'none'}; {parts}")
    return lines
