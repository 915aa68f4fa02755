"""What a search for refusal directions found, and its page: one file that loads nothing from outside."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fastguard import __version__
from fastguard.data.sources import DataSource
from fastguard.directions.found import Directions
from fastguard.directions.select import Selection
from fastguard.evaluation.figures import SERIES, Grid, Line, Panel, svg
from fastguard.evaluation.report import number, templates

KL_FLOOR = 1e-4
"""Divergences below are drawn here: they are rounding, and the axis is logarithmic."""


@dataclass(frozen=True)
class Choice:
    """One direction that was chosen, and among which positions; ``passed``: it passed the filters."""

    selection: Selection
    positions: tuple[int, ...]
    passed: bool

    @property
    def layer(self) -> int:
        """At whose input it was estimated."""
        return self.selection.layer

    @property
    def position(self) -> int:
        """Counted from the prompt's end."""
        return self.selection.position

    @property
    def at(self) -> tuple[int, int]:
        """Row and column in tensors by position and layer."""
        return self.positions.index(self.position), self.layer

    @property
    def refusal(self) -> float:
        """Score of harmful prompts without it."""
        return float(self.selection.refusal[self.at])

    @property
    def kl(self) -> float:
        """Divergence on harmless prompts without it."""
        return float(self.selection.kl[self.at])

    @property
    def steering(self) -> float:
        """Score of harmless prompts with it added."""
        return float(self.selection.steering[self.at])

    def plain(self) -> dict[str, Any]:
        """For JSON; None for what was not asked."""
        made = {
            "layer": self.layer, "position": self.position, "passed": self.passed, "refusal": self.refusal,
            "kl": self.kl, "steering": self.steering, "refusal_before": self.selection.harmful,
            "harmless_before": self.selection.harmless,
        }  # fmt: skip
        return {name: None if isinstance(v, float) and math.isnan(v) else v for name, v in made.items()}


@dataclass(frozen=True)
class Refusals:
    """The tokens that refusal is told by.

    source: ``given``, ``own`` (how the model's greedy refusals begin) or ``common``. refused: harmful validation
    prompts that the model refuses, of ``prompts``.
    """

    tokens: tuple[int, ...]
    words: tuple[str, ...]
    source: str
    refused: int
    prompts: int


@dataclass(frozen=True)
class Found:
    """Refusal directions of a model, and how they were found.

    Attributes:
        model: what was given. basis: [K, D] with orthonormal rows. means: all of the first phase, with their origin.
        choices: one a direction. separation: [P, L] area under the curve on held-out prompts.
        position_tokens: what stands at each position, where that is the same in all prompts.
        wanted: directions asked for; there are fewer where nothing was left. sources, settings: of the run.
    """

    model: str
    basis: Tensor
    means: Directions
    choices: Sequence[Choice]
    separation: Tensor
    refusals: Refusals
    position_tokens: tuple[str, ...]
    max_kl: float
    min_steering: float
    wanted: int
    sources: Mapping[str, DataSource]
    settings: Mapping[str, Any]
    dtype: str
    machine: str
    date: str
    wall_s: float

    @property
    def layers(self) -> int:
        """Of the model."""
        return int(self.separation.shape[1])


def write(found: Found, file: Path) -> Path:
    """Write the page there; returns the path."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(render(found), encoding="utf-8")
    return file


def render(found: Found) -> str:
    """The page, as text."""
    first = found.choices[0]
    ordered = sorted(range(len(found.means.positions)), key=lambda row: row != first.at[0])
    series = {row: (1 + i) % SERIES for i, row in enumerate(ordered)}  # the chosen position is drawn first, in blue
    page = templates().get_template("directions.html.j2")
    return page.render(
        found=found,
        version=__version__,
        first=first,
        headlines=headlines(found),
        limits=limits(found),
        legend_entries=[(place(found, row), series[row]) for row in sorted(series)],
        figures=_figures(found, series),
    )


def summary(found: Found) -> str:
    """The result in a few lines of plain text."""
    said = headlines(found)
    for i, one in enumerate(found.choices[1:], 2):
        said.append(
            f"Direction {i}: layer {one.layer}, position {one.position}; refusal score {_signed(one.refusal)} without "
            f"all {i}{'' if one.passed else ' (no candidate passed all filters)'}."
        )
    return "\n".join(said)


def headlines(found: Found) -> list[str]:
    """What was found, in sentences."""
    first, told = found.choices[0], found.refusals
    words = ", ".join(f"{w!r} ({t})" for w, t in zip(told.words, told.tokens, strict=True))
    how = {
        "given": "as given",
        "own": f"with which its {told.refused} refusals of {told.prompts} harmful prompts begin",
        "common": f"a common choice, since only {told.refused} of {told.prompts} harmful prompts were refused in a way "
        "that could be told by its first token",
    }[told.source]
    said = [
        f"Layer {first.layer} of {found.layers}, position {first.position}: without this direction the refusal score "
        f"of harmful prompts falls from {_signed(first.selection.harmful)} to {_signed(first.refusal)} (harmless "
        f"prompts: {_signed(first.selection.harmless)}).",
        f"Harmless prompts without it: the next token's distribution moves by {number(first.kl)} (bound "
        f"{found.max_kl:g}). With it added their refusal score is {_signed(first.steering)} (bound "
        f"{found.min_steering:g}).",
        f"It ranks {100 * float(found.separation[first.at]):.1f}% of pairs of a held-out harmful and a harmless prompt "
        "rightly (area under the curve).",
        f"Refusal is told by the first token: {words}, {how}.",
    ]
    if told.refused < 0.5 * told.prompts:
        said.append(
            f"Of {told.prompts} harmful prompts only {told.refused} were refused: what is found on a model that does "
            "not refuse need not be a refusal direction."
        )
    if len(found.choices) < found.wanted:
        said.append(
            f"{found.wanted} directions were asked for; after {len(found.choices)} the classes no longer differed."
        )
    return said


def limits(found: Found) -> list[str]:
    """What the figures do not show."""
    split = found.sources["harmful"]["splits"]
    return [
        "A refusal score is the log-odds that the next token is one of those above. It is not a judgement of answers: "
        "how many requests are refused before and after is measured by fastguard attack --method refusal_ablation.",
        f"The direction was chosen on {split['validation']['prompts']} harmful prompts, and the area under the curve "
        f"is of {split['held_out']['prompts']} others; similar prompts are kept together.",
        "A direction that separates the classes well need not be the one that refusal depends on: late layers often "
        "separate well and steer badly.",
    ]


def place(found: Found, row: int) -> str:
    """A position, with the token that stands there where it is always the same."""
    text = found.position_tokens[row]
    return f"{found.means.positions[row]}".replace("-", "\N{MINUS SIGN}") + (f"  {text}" if text else "")


def _signed(value: float) -> str:
    return number(value).replace("-", "\N{MINUS SIGN}")


def _figures(found: Found, series: Mapping[int, int]) -> dict[str, str]:
    first = found.choices[0]
    selection = first.selection
    row, layer = first.at

    def panel(title: str, values: Tensor, level: float | None, label: str, said: str, asked: bool = False) -> str:
        """Curves by layer, one a position; the chosen place has a ring. asked: of some candidates alone."""
        drawn = values.clamp_min(KL_FLOOR) if asked else values  # keeps nan
        lines = [
            Line(list(range(drawn.shape[1])), drawn[r].tolist(), series[r])
            for r in sorted(series, key=lambda r: r == row)
        ]
        return svg(
            Panel(
                title, lines, "layer", drawn.shape[1] - 1, level=level, level_label=label, markers=asked,
                rings=[(layer, float(drawn[row, layer]))], description=said,
            )
        )  # fmt: skip

    positions = [str(p).replace("-", "\N{MINUS SIGN}") for p in found.means.positions]
    return {
        "separation": panel(
            "Separation (AUC)", found.separation, 0.5, "dashed: chance",
            "Area under the curve of each layer's direction on held-out prompts, one curve a position",
        ),
        "refusal": svg(
            Grid(
                "Refusal score without it", selection.refusal.tolist(), "layer", "position", positions,
                f"refusal score of harmful prompts; as it is {_signed(selection.harmful)}", first.at,
                "Refusal score of harmful prompts under ablation of each candidate, by layer and position",
            )
        ),
        "steering": panel(
            "Steering", selection.steering, found.min_steering, f"dashed: at least {found.min_steering:g}",
            "Refusal score of harmless prompts with each candidate added, by layer",
        ),
        "kl": panel(
            "Divergence (KL)", selection.kl, found.max_kl if math.isfinite(found.max_kl) else None,
            f"dashed: at most {found.max_kl:g}",
            "Divergence of the next token on harmless prompts without each candidate, by layer", asked=True,
        ),
    }  # fmt: skip
