"""Where in a model safety rests, and where utility: the page of `fastguard saliency`, one file that loads nothing."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastguard import __version__
from fastguard.data.sources import DataSource
from fastguard.evaluation.figures import Grid, Line, Panel, svg
from fastguard.evaluation.report import templates
from fastguard.ops.masks import and_not, count_bits
from fastguard.progress import Progress, silent
from fastguard.saliency.choose import Weights, top
from fastguard.saliency.overlap import counts
from fastguard.saliency.scores import Scores

SHARES = (0.01, 0.05, 0.2)
"""Tops of which the overlap is drawn."""


@dataclass(frozen=True)
class Cell:
    """One weight: how many entries it has, how many are among safety's top, and of those not among utility's."""

    entries: int
    safety: int
    safety_only: int


@dataclass(frozen=True)
class Map:
    """What two scores say of each weight.

    Attributes:
        score, safety_top, utility_top: of the cells.
        layers: how many. modules: the last parts of the weights' names, in the order of a layer.
        cells: weight -> `Cell`. places: weight -> (module, layer), for those inside layers.
        overlap: share -> by layer the Jaccard overlap of both tops of that share.
    """

    score: str
    safety_top: float
    utility_top: float
    layers: int
    modules: tuple[str, ...]
    cells: Mapping[str, Cell]
    places: Mapping[str, tuple[str, int]]
    overlap: Mapping[float, Sequence[float]]

    @property
    def safety_only(self) -> float:
        """Of all entries that were scored, the share that would be pruned."""
        return sum(c.safety_only for c in self.cells.values()) / sum(c.entries for c in self.cells.values())

    def grid(self) -> list[list[float]]:
        """[modules, layers] of safety's top entries the share that utility's top has not; nan where there is none."""
        made = [[float("nan")] * self.layers for _ in self.modules]
        for name, (module, layer) in self.places.items():
            cell = self.cells[name]
            made[self.modules.index(module)][layer] = cell.safety_only / cell.safety if cell.safety else float("nan")
        return made


@dataclass(frozen=True)
class Measured:
    """The scores of a model on two sets, and what they are of."""

    model: str
    model_sha256: str
    maps: Map
    sources: Mapping[str, DataSource]
    samples: Mapping[str, int]
    settings: Mapping[str, Any]
    dtype: str
    machine: str
    date: str
    wall_s: float

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "maps"},
            "fastguard": __version__,
            "map": {
                "score": self.maps.score, "safety_top": self.maps.safety_top, "utility_top": self.maps.utility_top,
                "cells": {name: dataclasses.asdict(cell) for name, cell in self.maps.cells.items()},
                "overlap": {f"{share:g}": list(values) for share, values in self.maps.overlap.items()},
            },
        }  # fmt: skip


def mapped(
    found: Mapping[str, Scores], weights: Weights, score: str, safety_top: float, utility_top: float,
    progress: Progress = silent,
) -> Map:  # fmt: skip
    """Compare the scores ``safety`` and ``utility``, weight by weight, each within its matrix."""
    safety = found["safety"]
    cells: dict[str, Cell] = {}
    shared: dict[float, dict[int, list[int]]] = {share: {} for share in SHARES}
    for done, name in enumerate(safety.names, 1):

        @functools.cache  # a share may be the cell's and one of those drawn
        def choose(role: str, share: float, name: str = name) -> torch.Tensor:
            return top(found[role], weights, share, score=score, names=[name])[name]

        first, second = choose("safety", safety_top), choose("utility", utility_top)
        cells[name] = Cell(
            weights(name).numel(), int(count_bits(first)), int(count_bits(and_not(first, second)))
        )  # fmt: skip
        layer = safety.layers[name]
        for share in SHARES if layer is not None else ():
            part = shared[share].setdefault(int(layer or 0), [0, 0])
            for i, count in enumerate(counts(choose("safety", share), choose("utility", share))):
                part[i] += count
        progress("compare", done / len(safety.names) * 0.999, f"{done} of {len(safety.names)} weights")
    places = {name: (_module(name), int(layer)) for name, layer in safety.layers.items() if layer is not None}
    layers = 1 + max((layer for _, layer in places.values()), default=0)
    overlap = {
        share: [
            both / either if either else float("nan") for both, either in (each.get(i, (0, 0)) for i in range(layers))
        ]
        for share, each in shared.items()
    }
    progress("compare", 1.0, f"{len(cells)} weights")
    modules = tuple(dict.fromkeys(module for module, _ in places.values()))
    return Map(score, safety_top, utility_top, layers, modules, cells, places, overlap)


def write(measured: Measured, file: Path) -> Path:
    """Write the page there; returns the path."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(render(measured), encoding="utf-8")
    return file


def render(measured: Measured) -> str:
    """The page, as text."""
    page = templates().get_template("saliency.html.j2")
    return page.render(
        measured=measured, version=__version__, headlines=headlines(measured), limits=limits(measured),
        figures=_figures(measured.maps), legend_entries=[(f"top {100 * s:g}%", i + 1) for i, s in enumerate(SHARES)],
        by_module=_by_module(measured.maps),
    )  # fmt: skip


def summary(measured: Measured) -> str:
    """The result in a few lines of plain text."""
    return "\n".join(headlines(measured))


def headlines(measured: Measured) -> list[str]:
    """What was found, in sentences."""
    maps = measured.maps
    rows = sorted(_by_module(maps), key=lambda row: -row[3])
    layers = _by_layer(maps)
    best = max(layers, key=lambda layer: layers[layer])
    middle = sorted(v for v in maps.overlap[SHARES[1]] if v == v)
    typical = middle[len(middle) // 2] if middle else float("nan")
    return [
        f"{100 * maps.safety_only:.2f}% of {_count(sum(c.entries for c in maps.cells.values()))} entries are among the "
        f"top {100 * maps.safety_top:g}% for safety and not among the top {100 * maps.utility_top:g}% for utility "
        f"({maps.score}, within each matrix).",
        f"They make up the largest part of safety's top in {rows[0][0]} ({100 * rows[0][3]:.0f}%) and in layer {best} "
        f"({100 * layers[best]:.0f}%).",
        f"The tops of {100 * SHARES[1]:g}% of both overlap by {typical:.2f} in the layer in the middle (Jaccard; by "
        f"chance {SHARES[1] / (2 - SHARES[1]):.3f}).",
    ]


def limits(measured: Measured) -> list[str]:
    """What the figures do not show."""
    fewer = min(measured.samples.values())
    said = [
        "A score is a first-order guess of what the loss does when an entry becomes 0, each alone. What pruning does "
        "to refusal and utility is measured on the pruned model: fastguard prune, then fastguard evaluate.",
        "Freezing such entries has not been found to stop fine-tuning attacks (arXiv 2402.05162).",
        "The tops are taken within each matrix, so that a matrix cannot have more of them than another.",
    ]
    if fewer < 128:
        said.append(f"The smaller set has {fewer} samples; 128 are published. The ranking of small scores is noise.")
    return said


def _module(name: str) -> str:
    """The part of a weight's name that all layers share, as ``self_attn.q_proj``."""
    parts = name.removesuffix(".weight").split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[numbers[0] + 1 :]) if numbers else ".".join(parts)


def _by_module(maps: Map) -> list[tuple[str, int, float, float]]:
    """Module, entries, and of these the share that is safety's alone; of safety's top the share that is."""
    made = []
    for module in maps.modules:
        cells = [maps.cells[name] for name, (m, _) in maps.places.items() if m == module]
        entries, only = sum(c.entries for c in cells), sum(c.safety_only for c in cells)
        made.append((module, entries, only / entries, only / max(sum(c.safety for c in cells), 1)))
    return made


def _by_layer(maps: Map) -> dict[int, float]:
    """Of safety's top in a layer, the share that is not utility's."""
    made: dict[int, list[int]] = {}
    for name, (_, layer) in maps.places.items():
        part = made.setdefault(layer, [0, 0])
        part[0] += maps.cells[name].safety_only
        part[1] += maps.cells[name].safety
    return {layer: only / max(safety, 1) for layer, (only, safety) in made.items()}


def _count(number: int) -> str:
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{number / size:.1f} {word}"
    return f"{number:,}"


def _figures(maps: Map) -> dict[str, str]:
    names = [module.rpartition(".")[2].removesuffix("_proj") for module in maps.modules]
    unique = names if len(set(names)) == len(names) else list(maps.modules)
    return {
        "map": svg(
            Grid(
                "Safety's alone", maps.grid(), "layer", "", unique,
                f"of safety's {100 * maps.safety_top:g}%, share not in utility's {100 * maps.utility_top:g}%", None,
                "Share of each matrix's safety-critical entries that are not utility-critical, by layer and module",
                highest=True,
            )
        ),
        "overlap": svg(
            Panel(
                "Overlap (Jaccard)",
                [Line(list(range(maps.layers)), list(values), 1 + i) for i, values in enumerate(maps.overlap.values())],
                "layer", maps.layers - 1, markers=False,
                description="Jaccard overlap of the most salient entries for safety and for utility, by layer",
            )
        ),
    }  # fmt: skip
