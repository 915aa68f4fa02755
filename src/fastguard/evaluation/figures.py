"""The figures of a report: matplotlib drawings as SVG that takes its colours from the page.

Colours are drawn as marks (``#0000NN``) that become CSS variables, so that one drawing serves light and dark;
text stays text. Each figure is one narrow panel: the page sets them side by side or one below the other.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, FAINT, RULE = "#000001", "#000002", "#000003"
_VARIABLES = {INK: "--ink", FAINT: "--faint", RULE: "--rule"}
SERIES = 8
_VARIABLES |= {f"#0000{16 + i:02x}": f"--series-{i}" for i in range(SERIES)}
_DASHES = ("-", "-", (0, (5, 2)), "-", "-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
_MARKERS = ("s", "o", "^", "D", "v", "P", "X", "*")


def colour(series: int) -> str:
    """The mark of a series below SERIES; the page defines ``--series-0`` to ``--series-7``."""
    return f"#0000{16 + series:02x}"


@dataclass
class Line:
    """One curve: its points, the series it belongs to, and what happened at its end."""

    x: Sequence[float]
    y: Sequence[float]
    series: int
    stopped: bool = False  # ends before the axis does, because the attack had succeeded
    crossing: float | None = None  # where it meets the level


@dataclass
class Panel:
    """One pair of axes."""

    title: str
    lines: list[Line]
    x_label: str
    x_max: float
    rate: bool = False  # y runs from 0 to 100%
    level: float | None = None
    level_label: str = ""  # says what the dashed line is, or where it would be
    markers: bool = True
    rings: Sequence[tuple[float, float]] = ()  # points to look at
    description: str = ""  # for readers who do not see it


@dataclass
class Grid:
    """A field of numbers as a heat map, the lowest strongest in colour, or the highest."""

    title: str
    values: Sequence[Sequence[float]]  # [rows, columns]; nan: left out
    x_label: str
    y_label: str
    rows: Sequence[str]  # a name for each, from above
    scale_label: str
    chosen: tuple[int, int] | None = None  # row and column of the cell to look at
    description: str = ""
    highest: bool = False  # strongest in colour


def svg(drawn: Panel | Grid) -> str:
    """The panel as an ``<svg>`` element for inline use."""
    import matplotlib

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": drawn.title + drawn.description,  # ids differ between figures, and not between runs
        "font.family": "DejaVu Sans",
        "font.size": 9.5,
        "text.parse_math": False,
        "text.color": INK,
        "axes.edgecolor": RULE,
        "axes.labelcolor": FAINT,
        "xtick.color": RULE,
        "ytick.color": RULE,
        "xtick.labelcolor": FAINT,
        "ytick.labelcolor": FAINT,
    }
    with matplotlib.rc_context(style):
        figure = _curves(drawn) if isinstance(drawn, Panel) else _field(drawn)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue(), drawn)


def _curves(panel: Panel) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    figure = Figure(figsize=(3.9, 2.95), layout="constrained")
    axes = figure.subplots()
    axes.set_title(panel.title, loc="left", fontsize=10.5, fontweight="bold")
    axes.set_xlabel(panel.x_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 4, 5, 8, 10]))
    values = [value for line in panel.lines for value in line.y if math.isfinite(value)]
    if panel.rate:
        axes.set_ylim(-0.03, 1.03)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    elif values and min(values) > 0 and max(values) > 4 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="y", which="minor", length=0)
    for line in panel.lines:
        axes.plot(
            line.x, line.y, color=colour(line.series), linestyle=_DASHES[line.series], linewidth=1.8,
            marker=_MARKERS[line.series] if panel.markers else "", markersize=4, clip_on=False,
            zorder=3,
        )  # fmt: skip
        if line.stopped and line.x[-1] < panel.x_max:
            rest = [line.x[-1], panel.x_max], [line.y[-1]] * 2
            axes.plot(*rest, color=colour(line.series), linestyle=(0, (1, 3)), linewidth=1, zorder=2)
        if line.crossing is not None and panel.level is not None:
            at = line.crossing, panel.level
            axes.plot(*at, marker="o", markersize=8, markerfacecolor="none", color=INK, zorder=4)
    if panel.level is not None:
        axes.axhline(panel.level, color=INK, linestyle=(0, (4, 3)), linewidth=0.9, zorder=1)
    axes.set_title(panel.level_label, loc="right", fontsize=8, color=FAINT)
    for at in panel.rings:
        axes.plot(*at, marker="o", markersize=9, markerfacecolor="none", color=INK, zorder=4, clip_on=False)
    axes.set_xlim(-0.02 * panel.x_max, panel.x_max * 1.02 or 1)
    return figure


def _field(grid: Grid) -> Figure:
    """Cells in one colour, more or less of it, so that the page's light or dark shines through."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    rows, columns = len(grid.values), len(grid.values[0])
    figure = Figure(figsize=(3.9, min(1.5 + 0.26 * rows, 5.5)), layout="constrained")
    axes, scale = figure.subplots(2, 1, height_ratios=[max(rows, 3), 0.55])
    axes.set_title(grid.title, loc="left", fontsize=10.5, fontweight="bold")
    axes.set(xlim=(0, columns), ylim=(rows, 0), xlabel=grid.x_label, ylabel=grid.y_label)
    axes.set_yticks([row + 0.5 for row in range(rows)], grid.rows)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 4, 5, 8, 10]))
    axes.tick_params(length=0)
    axes.set_xticks([tick + 0.5 for tick in axes.get_xticks() if 0 <= tick < columns],
                    [f"{tick:g}" for tick in axes.get_xticks() if 0 <= tick < columns])  # fmt: skip
    known = [value for row in grid.values for value in row if math.isfinite(value)]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)

    def strength(value: float) -> float:
        share = (value - low) / ((high - low) or 1)
        return 1 - 0.9 * (1 - share if grid.highest else share)

    for y, row in enumerate(grid.values):
        for x, value in enumerate(row):
            if math.isfinite(value):
                axes.add_patch(Rectangle((x, y), 1, 1, facecolor=colour(1), alpha=strength(value), linewidth=0))
    if grid.chosen is not None:
        y, x = grid.chosen
        axes.add_patch(Rectangle((x, y), 1, 1, fill=False, edgecolor=INK, linewidth=1.8, clip_on=False, zorder=4))
    steps = 24
    for i in range(steps):
        value = low + (high - low) * (i + 0.5) / steps
        scale.add_patch(
            Rectangle((i / steps, 0), 1 / steps, 1, facecolor=colour(1), alpha=strength(value), linewidth=0)
        )
    scale.set(xlim=(0, 1), ylim=(0, 1), yticks=[], xlabel=grid.scale_label)
    scale.set_xticks(
        [0, 0.5, 1], [f"{value:.3g}".replace("-", "\N{MINUS SIGN}") for value in (low, (low + high) / 2, high)]
    )
    scale.tick_params(length=0)
    scale.spines[:].set_visible(False)
    return figure


def _inline(text: str, panel: Panel | Grid) -> str:
    """What a page needs of a standalone SVG file: its element, in the page's colours and font, with a description."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style).*?</\1>", "", text, flags=re.S)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    text = re.sub(r'\s(xmlns(:xlink)?|version)="[^"]*"', "", text)
    text = text.replace("xlink:href", "href").replace("'DejaVu Sans'", "inherit")
    for mark, variable in _VARIABLES.items():
        text = text.replace(mark, f"var({variable})")
    said = html.escape(panel.description or panel.title)
    return re.sub(r"^<svg ", f'<svg role="img" aria-label="{said}" ', text, count=1)
