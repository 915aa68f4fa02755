"""The figures of a report: matplotlib drawings as SVG that takes its colours from the page.

Colours are drawn as marks (``#0000NN``) that become CSS variables, so that one drawing serves light and dark;
text stays text. Each figure is one narrow panel: the page sets them side by side or one below the other.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
    level_label: str = ""  # says what the dashed line is
    markers: bool = True
    description: str = ""  # for readers who do not see it


def svg(panel: Panel) -> str:
    """The panel as an ``<svg>`` element for inline use."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": panel.title + panel.description,  # ids differ between figures, and not between runs
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
        figure = Figure(figsize=(3.9, 2.95), layout="constrained")
        axes = figure.subplots()
        axes.set_title(panel.title, loc="left", fontsize=10.5, fontweight="bold")
        axes.set_xlabel(panel.x_label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 4, 5, 8, 10]))
        values = [value for line in panel.lines for value in line.y]
        if panel.rate:
            axes.set_ylim(-0.03, 1.03)
            axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
        elif min(values) > 0 and max(values) > 4 * min(values):
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
        axes.set_xlim(-0.02 * panel.x_max, panel.x_max * 1.02 or 1)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue(), panel)


def _inline(text: str, panel: Panel) -> str:
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
