"""One self-contained page, ``report.html``, from the ``metrics.json`` of a run.

The page loads nothing: style, drawings and text are in it, and its content-security policy forbids the rest.
It reads on wide and narrow screens, in light and dark. Every sentence is made from the figures of the run.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastguard import methods
from fastguard.data.sources import left_out
from fastguard.evaluation.figures import SERIES, Line, Panel, svg
from fastguard.evaluation.metrics import (
    MAIN,
    SCHEMA,
    Applied,
    Attack,
    Kind,
    Metrics,
    Model,
    Repair,
    Served,
    Utility,
    kind_of,
)

if TYPE_CHECKING:
    import jinja2

_SERIES = {"aligned": 0, "immunized": 1, "control": 2}
_COMPONENTS = {
    "loss": "loss",
    "harmless_ce": "harmless cross-entropy",
    "harmful_ce": "harmful cross-entropy, output",
    "lens_ce": "harmful cross-entropy, layers",
    "noise": "noise (MMD)",
    "retain_ce": "retain cross-entropy",
}


def write(run_dir: Path) -> Path:
    """Write ``report.html`` beside the ``metrics.json`` in ``run_dir``; returns its path.

    Raises FileNotFoundError where there are no metrics, ValueError where they are of another schema.
    """
    file = Path(run_dir) / "report.html"
    file.write_text(render(load(run_dir)), encoding="utf-8")
    return file


def write_page(metrics: Metrics, file: Path) -> Path:
    """Write the page of these metrics there; returns the path."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(render(metrics), encoding="utf-8")
    return file


def combined(runs: Mapping[str, Metrics]) -> Metrics:
    """Several runs as one document: each model under its run's name, and each run's notes once.

    Raises ValueError where two runs were scored at different thresholds, whose crossings do not compare.
    """
    thresholds = {a["threshold"] for m in runs.values() for model in m["models"].values() for a in model["attacks"]}
    if len(thresholds) > 1:
        raise ValueError(f"RUN_DIR: the runs have different thresholds of compliance, {sorted(thresholds)}")
    names = _short_names(list(runs))
    first = next(iter(runs.values()))
    together = {f"{names[r]}: {n}": m for r, metrics in runs.items() for n, m in metrics["models"].items()}
    return Metrics(
        schema=SCHEMA,
        title=" and ".join(names.values()),
        quick=any(m["quick"] for m in runs.values()),
        config={names[run]: m["config"] for run, m in runs.items()},
        environment=first["environment"],
        data={f"{names[run]}: {name}": source for run, m in runs.items() for name, source in m["data"].items()},
        stages=[{**s, "name": f"{names[run]}: {s['name']}"} for run, m in runs.items() for s in m["stages"]],
        wall_s=sum(m["wall_s"] for m in runs.values()),
        peak_memory_bytes=max(m["peak_memory_bytes"] for m in runs.values()),
        models=together,
        aims=[{**aim, "name": f"{names[run]}: {aim['name']}"} for run, m in runs.items() for aim in m["aims"]],
        notes=list(dict.fromkeys(note for m in runs.values() for note in m["notes"])),
    )


def _short_names(runs: Sequence[str]) -> dict[str, str]:
    """The last part of each path, where that tells them apart."""
    last = {run: Path(run).name or run for run in runs}
    return last if len(set(last.values())) == len(runs) else {run: run for run in runs}


def load(run_dir: Path) -> Metrics:
    """Read the metrics of a run. Raises FileNotFoundError or ValueError."""
    file = Path(run_dir) / "metrics.json"
    if not file.is_file():
        raise FileNotFoundError(f"RUN_DIR: no {file}; expected the folder of a finished run")
    try:
        metrics = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from error
    found = metrics.get("schema") if isinstance(metrics, dict) else None
    if found != SCHEMA:
        raise ValueError(f"{file}: metrics of schema {found!r}, expected {SCHEMA}")
    return metrics


def render(metrics: Metrics) -> str:
    """The page, as text."""
    import yaml

    series = _series(metrics)
    page = templates().get_template("report.html.j2")
    return page.render(
        run=metrics,
        series=series,
        headlines=headlines(metrics),
        attacks=_attack_figures(metrics, series),
        table=comparison(metrics),
        repairs=repairs(metrics),
        repair_columns=REPAIR_COLUMNS,
        training=_training_figures(metrics),
        benign=_benign_figure(metrics, series),
        samples=_samples(metrics),
        limits=limits(metrics),
        longest=max((stage["wall_s"] for stage in metrics["stages"]), default=1.0) or 1.0,
        config=yaml.safe_dump(metrics["config"], sort_keys=False, allow_unicode=True),
    )


def templates() -> jinja2.Environment:
    """Templates of pages, with the filters that they use."""
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.PackageLoader("fastguard.evaluation"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    made.filters |= {"number": number, "duration": duration, "memory": memory, "left_out": left_out}
    return made


def summary(metrics: Metrics) -> str:
    """The result in a few lines of plain text."""
    said = headlines(metrics)
    for aim in metrics["aims"]:
        state = {True: "met", False: "MISSED", None: "not measured"}[aim["met"]]
        value = "-" if aim["value"] is None else number(aim["value"])
        said.append(f"{state:>12}  {aim['name']}: {value} (asked: {aim['sense']} {aim['bound']:g})")
    return "\n".join(said)


def headlines(metrics: Metrics) -> list[str]:
    """What the attacks found, a sentence per learning rate, and what the defense cost."""
    models, said = metrics["models"], []
    for kind in _kinds(metrics):
        steps = [
            f"{crossing_text(attacks, 'compliance_crossing')} on the {name} model"
            for name, model in models.items()
            if (attacks := _at(model, kind))
        ]
        first = _first(metrics, kind)
        what = "Attack steps" if kind[0] == MAIN else f"{_units(kind).capitalize()} of {first.get('title', kind[0])}"
        at = "" if kind[1] is None else f", at learning rate {kind[1]:g}"
        said.append(f"{what} until {percent(first['threshold'])} of answers comply{at}: {_and(steps)}.")
    for kind in _kinds(metrics)[:1]:  # the main attack, at its first learning rate
        mended = {name: found for name, model in models.items() if (found := _repairs(_at(model, kind)))}
        changes = [
            f"from {percent(before)} to {percent(after)} on the {name} model"
            for name, found in mended.items()
            if (before := _mean(found, "before", "compliance")) is not None
            and (after := _mean(found, "after", "compliance")) is not None
        ]
        if changes:
            said.append(f"{_titles(mended.values())} after the attack takes compliance {_and(changes)}.")
    if {"aligned", "immunized"} <= set(models):
        worth = [u["perplexity"] for n in ("aligned", "immunized") if (u := models[n]["utility"]) and u["perplexity"]]
        if len(worth) == 2:
            before, after = worth
            said.append(
                f"Perplexity on harmless text: {number(after)} after immunization, {number(before)} before "
                f"({after / before:.2f} times)."
            )
    return said or ["Nothing was measured."]


def crossing_text(attacks: Sequence[Attack], which: str) -> str:
    """The step at which a curve crosses its level: one figure, or median and range over the seeds.

    ``which``: ``compliance_crossing`` or ``refusal_crossing``. An attack that does not get there counts as more
    than its budget.
    """
    steps = sorted((math.inf if a[which] is None else a[which], a["budget"]) for a in attacks)  # type: ignore[literal-required]

    def text(step: float, budget: int) -> str:
        return f"more than {budget}" if step == math.inf else f"{step:.1f}"

    if len(steps) == 1:
        return text(*steps[0])
    middle = statistics.median(step for step, _ in steps)
    budget = min(budget for _, budget in steps)
    low, high = text(*steps[0]), text(*steps[-1])
    return text(middle, budget) if low == high else f"{text(middle, budget)} ({low} to {high})"


@dataclass
class Row:
    """One line of the comparison: a name, what it means, and a cell for each model."""

    name: str
    note: str
    cells: list[str]


@dataclass
class Group:
    """Lines of the comparison that belong together."""

    title: str
    rows: list[Row] = field(default_factory=list)


def comparison(metrics: Metrics) -> list[Group]:
    """The table of all models: under attack, what the defense costs, how each was made."""
    models = list(metrics["models"].values())

    def row(name: str, note: str, cell: Callable[[Model], str | None]) -> Row:
        return Row(name, note, [cell(model) or "not measured" for model in models])

    groups = [_under_attack(metrics, kind, row) for kind in _kinds(metrics)]
    utility = Group(
        "What it costs",
        [
            row(
                "Perplexity",
                "held-out harmless conversations",
                _worth(lambda u: _shown(u["perplexity"], number)),
            ),
            row(
                "Over-refusal",
                "ordinary instructions refused",
                _worth(lambda u: _shown(u["over_refusal"], percent)),
            ),
            row("Refusal of edgy prompts", "harmless, but they sound dangerous", _worth(_edgy_text)),
            row("Learns a benign task", "held-out loss before and after", _worth(_benign_text)),
        ],
    )
    if any("guard" in attack for model in models for attack in model["attacks"]):
        utility.rows.append(row("Guard", "set up before each fine-tuning", _guard_text))
    made = Group(
        "How it was made",
        [
            row("Method", "", lambda m: m["training"]["method"]),
            row("From", "", lambda m: m["training"]["parent"]),
            row("Optimisation", "steps, time, learning rate", _training_text),
        ],
    )
    return [*groups, utility, made]


REPAIR_COLUMNS = ("Compliance", "Refusal", "Harmful loss", "Perplexity", "Task loss", "Time")
"""Of the table of repairs, beside the model."""


def repairs(metrics: Metrics) -> list[Group]:
    """What a repair changed: a group for each fine-tuning, a row for each model, `REPAIR_COLUMNS`; none without any."""
    models, groups = metrics["models"], list[Group]()
    for kind in _kinds(metrics):
        rows = {name: _repairs(_at(model, kind)) for name, model in models.items()}
        attack = _first(metrics, kind).get("title", "harmful fine-tuning")
        groups.append(_repair_group(f"After {attack}{_rate(kind)}", rows))
    harmless = {n: [b] if (u := m["utility"]) and (b := u["benign"]) else [] for n, m in models.items()}
    title = "After fine-tuning on the harmless task"
    groups.append(_repair_group(title, {name: _repairs(found) for name, found in harmless.items()}))
    return [group for group in groups if group.rows]


def _repair_group(title: str, rows: Mapping[str, Sequence[Repair]]) -> Group:
    group = Group(title)
    for name, found in rows.items():
        if not found:
            continue

        def cell(key: str, text: Callable[[float], str], found: Sequence[Repair] = found) -> str:
            before, after = (_mean(found, when, key) for when in ("before", "after"))
            if before is None or after is None:
                return "not measured"
            return f"{text(before)} → {text(after)}"

        wall = statistics.fmean(one["wall_s"] for one in found)
        group.rows.append(Row(name, f"{_titles([found])}{_figures_text(found)}", [
            cell("compliance", percent), cell("refusal", percent), cell("harmful_loss", number),
            cell("perplexity", number), cell("task_loss", number), duration(wall),
        ]))  # fmt: skip
    return group


def _repairs(fine_tunings: Iterable[Served]) -> list[Repair]:
    return [one["repair"] for one in fine_tunings if "repair" in one]


def _mean(found: Sequence[Repair], when: str, key: str) -> float | None:
    """Of a figure before or after, over the seeds; None where one was not measured."""
    values = [one[when][key] for one in found]  # type: ignore[literal-required]
    return None if any(v is None for v in values) else statistics.fmean(values)


def _titles(found: Iterable[Sequence[Applied]]) -> str:
    return _and(dict.fromkeys(one["title"] for some in found for one in some))


def _figures_text(found: Sequence[Applied]) -> str:
    """What a defense found, as its last round says, after its title; the mean over the seeds."""
    names = found[0]["figures"]
    said = [
        f"{name.replace('_', ' ')} {number(statistics.fmean(one['figures'].get(name, math.nan) for one in found))}"
        for name in names
    ]
    return f": {', '.join(said)}" if said else ""


def _guard_text(model: Model) -> str | None:
    """What the guard cost before each fine-tuning of a model."""
    found = [a["guard"] for a in model["attacks"] if "guard" in a]
    if not found:
        return "none"
    wall = duration(statistics.fmean(one["wall_s"] for one in found))
    return f"{_titles([found])}, {wall}{_figures_text(found)}"


def _under_attack(metrics: Metrics, kind: Kind, row: Callable[[str, str, Callable[[Model], str | None]], Row]) -> Group:
    """The lines of the comparison that one attack at one learning rate gives."""
    first, units = _first(metrics, kind), _units(kind)
    level, rest, whole = (
        percent(first["threshold"]),
        percent(1 - first["threshold"]),
        f"over {units} 0 to {first['budget']}",
    )
    several = len(_seeds(metrics)) > 1
    interpolated = "interpolated" + ("; median and range of the seeds" if several else "")

    def crossed(which: str) -> Callable[[Model], str | None]:
        return lambda model: crossing_text(found, which) if (found := _at(model, kind)) else None

    def mean(which: str) -> Callable[[Model], str | None]:
        return lambda model: (
            percent(statistics.fmean(a[which] for a in found)) if (found := _at(model, kind)) else None  # type: ignore[literal-required]
        )

    def losses(model: Model) -> str | None:
        points = [a["points"] for a in _at(model, kind)]
        if not points:
            return None
        first, last = (statistics.fmean(p[i]["harmful_loss"] for p in points) for i in (0, -1))
        return _change(first, last)

    return Group(
        f"Under {'attack' if kind[0] == MAIN else first.get('title', kind[0])}{_rate(kind)}",
        [
            row(f"{units.capitalize()} until {level} comply", interpolated, crossed("compliance_crossing")),
            row(f"{units.capitalize()} until refusal falls to {rest}", interpolated, crossed("refusal_crossing")),
            row("Mean compliance", whole, mean("compliance_area")),
            row("Mean refusal", whole, mean("refusal_area")),
            row(
                "Harmful loss",
                f"first and last scored {units[:-1]}" + ("; mean of the seeds" if several else ""),
                losses,
            ),
        ],
    )


def limits(metrics: Metrics) -> list[str]:
    """What the figures of this run do not show; then the notes of the run itself."""
    said = []
    if metrics["quick"]:
        said.append("This was a quick run, to see that everything works. Its figures are no result.")
    if "harmful" in metrics["data"] and "measure" in metrics["data"]["harmful"]["splits"]:
        n = max(metrics["data"]["harmful"]["splits"]["measure"]["prompts"], 1)
        said.append(
            f"Rates come from {n} held-out harmful prompts: one prompt is {100 / n:.1f} points, and a rate near 50% "
            f"is known to about \N{PLUS-MINUS SIGN}{196 * math.sqrt(0.25 / n):.0f} points (95%, binomial)."
        )
    seeds = len(_seeds(metrics))
    said.append(
        f"Each model was trained once and attacked with {seeds} seed{'s' if seeds != 1 else ''} per learning rate: "
        "the spread between trainings is not shown."
    )
    if kinds := _kinds(metrics):
        rates = sorted({lr for _, lr in kinds if lr is not None})
        at = f", at learning rate{_s(rates)} {_and(f'{lr:g}' for lr in rates)}" if rates else ""
        tried = _and(dict.fromkeys(_tried(metrics, kind) for kind in kinds))
        edited = any(lr is None for _, lr in kinds)
        said.append(
            f"Only {tried} {'were' if len({name for name, _ in kinds}) > 1 else 'was'} tried{at}: no other kinds of "
            "attack, no other optimizers, no search for the attacker's best settings, no jailbreak prompts"
            f"{'' if edited else ', no editing of weights or activations'}."
        )
    if any("guard" in one or "repair" in one for model in metrics["models"].values() for one in model["attacks"]):
        said.append(
            "No attacker knew of the guard or the repair: nobody trained around what is frozen, or against repair."
        )
    model: Any = metrics["config"].get("model")
    if model:
        said.append(
            f"One model, {model.get('name', 'unnamed')}, with short trainings: nothing here says how other sizes, "
            "families or longer immunizations behave."
        )
    said.append("Crossings are linear between scored steps. Times hold for this machine under the load it had.")
    return [*said, *(note for note in metrics["notes"] if note not in said)]


def markdown(metrics: Metrics) -> str:
    """The comparison of all models as a Markdown table, with machine and date, for the documentation."""
    where = metrics["environment"]
    lines = [
        f"{metrics['title']}{' (quick run: no result)' if metrics['quick'] else ''}. {where['cpu']}, threads: "
        f"{where['threads']}, {where['dtype']}; torch {where['versions'].get('torch', 'of unknown version')}; "
        f"{where['date'][:10]}; {duration(metrics['wall_s'])}.",
        "",
        "| | " + " | ".join(metrics["models"]) + " |",
        "|---" * (len(metrics["models"]) + 1) + "|",
    ]
    for group in comparison(metrics):
        lines.append(f"| **{group.title}** |" + " |" * len(metrics["models"]))
        for row in group.rows:
            name = f"{row.name} ({row.note})" if row.note else row.name
            lines.append(f"| {name} | " + " | ".join(cell.replace("|", "\\|") for cell in row.cells) + " |")
    if groups := repairs(metrics):
        lines += ["", "| before the repair → after it | " + " | ".join(REPAIR_COLUMNS) + " |"]
        lines.append("|---" * (len(REPAIR_COLUMNS) + 1) + "|")
    for group in groups:
        lines.append(f"| **{group.title}** |" + " |" * len(REPAIR_COLUMNS))
        lines += [f"| {row.name} ({row.note}) | " + " | ".join(row.cells) + " |" for row in group.rows]
    return "\n".join(lines) + "\n"


def percent(value: float) -> str:
    """A rate as a percentage."""
    return f"{100 * value:.3g}%"


def number(value: float) -> str:
    """Three significant digits, without an exponent where that is readable."""
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:#.3g}".removesuffix(".")


def duration(seconds: float) -> str:
    """Seconds as ``41 s``, ``4 min 50 s`` or ``1 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def memory(size: int) -> str:
    """Bytes in GiB."""
    return f"{size / 2**30:.2f} GiB"


def _series(metrics: Metrics) -> dict[str, int]:
    """The colour of each model; further models take what follows the three usual ones."""
    extra = [name for name in metrics["models"] if name not in _SERIES]
    colours = _SERIES | {name: (len(_SERIES) + i) % SERIES for i, name in enumerate(extra)}
    return {name: colours[name] for name in metrics["models"]}


def _kinds(metrics: Metrics) -> list[Kind]:
    """The attacks that there are, the main one first, at its learning rates in order."""
    found = dict.fromkeys(kind_of(a) for model in metrics["models"].values() for a in model["attacks"])
    names = list(dict.fromkeys(name for name, _ in found))
    return sorted(found, key=lambda kind: (kind[0] != MAIN, names.index(kind[0]), kind[1] or 0.0))


def _first(metrics: Metrics, kind: Kind) -> Attack:
    return next(a for model in metrics["models"].values() for a in _at(model, kind))


def _units(kind: Kind) -> str:
    return "rounds" if kind[1] is None else "steps"


def _rate(kind: Kind) -> str:
    return "" if kind[1] is None else f", learning rate {kind[1]:g}"


def _tried(metrics: Metrics, kind: Kind) -> str:
    """What an attack is called; documents from before attacks had names have the one that there was."""
    if kind[0] != MAIN:
        return _first(metrics, kind).get("title", kind[0])
    configured: Any = metrics["config"].get("attack", {})
    entry = methods.attacks().get(configured.get("method", "harmful_finetuning"))
    return entry.summary.rstrip(".").replace("Harmful", "harmful") if entry else "one kind of attack"


def _seeds(metrics: Metrics) -> list[int]:
    return sorted({a["seed"] for model in metrics["models"].values() for a in model["attacks"]})


def _at(model: Model, kind: Kind) -> list[Attack]:
    return [a for a in model["attacks"] if kind_of(a) == kind]


def _and(parts: Iterable[str]) -> str:
    *most, last = list(parts)
    return f"{', '.join(most)} and {last}" if most else last


def _s(things: Sequence[object]) -> str:
    return "s" if len(things) != 1 else ""


def _training_text(model: Model) -> str:
    made = model["training"]
    if not made["steps"]:
        return "none"
    if made["lr"] is None:
        return f"{made['steps']} round{'s' if made['steps'] > 1 else ''}, {duration(made['wall_s'])}"
    return f"{made['steps']} steps, {duration(made['wall_s'])}, {made['lr']:g}"


def _worth(cell: Callable[[Utility], str | None]) -> Callable[[Model], str | None]:
    """A cell of what a model is worth before an attack, where that was measured."""
    return lambda model: None if model["utility"] is None else cell(model["utility"])


def _shown(value: float | None, text: Callable[[float], str]) -> str | None:
    return None if value is None else text(value)


def _edgy_text(utility: Utility) -> str | None:
    return _shown(utility["edgy_over_refusal"], percent)


def _change(before: float, after: float) -> str:
    return f"{number(before)} \N{RIGHTWARDS ARROW} {number(after)}"


def _benign_text(utility: Utility) -> str | None:
    benign = utility["benign"]
    if benign is None:
        return None
    return f"{_change(benign['loss'][0], benign['loss'][-1])} (step {benign['steps'][-1]})"


def _attack_figures(metrics: Metrics, series: dict[str, int]) -> list[dict[str, Any]]:
    """For each attack and learning rate three panels over one axis of steps: compliance, refusal, harmful loss."""
    return [
        {
            "title": f"{first.get('title', 'harmful fine-tuning')}{_rate(kind)}",
            "batch": None if kind[1] is None else first["batch"],
            "units": _units(kind),
            "budget": max(a["budget"] for _, a in runs),
            "several": max(sum(name == n for n, _ in runs) for name in series) > 1,
            "panels": _attack_panels([(series[name], a) for name, a in runs], kind),
        }
        for kind in _kinds(metrics)
        if (first := _first(metrics, kind))
        and (runs := [(name, a) for name, model in metrics["models"].items() for a in _at(model, kind)])
    ]


def _attack_panels(runs: Sequence[tuple[int, Attack]], kind: Kind) -> list[str]:
    """The panels of one attack at one learning rate; ``runs`` are attacks with the colour of their model."""
    threshold, budget, axis = runs[0][1]["threshold"], max(a["budget"] for _, a in runs), f"attack {_units(kind)}"
    at = f"{runs[0][1].get('title', 'harmful fine-tuning')}{_rate(kind)}"

    def lines(key: str, crossing: str | None) -> list[Line]:
        return [
            Line(
                x=[p["step"] for p in a["points"]],
                y=[p[key] for p in a["points"]],  # type: ignore[literal-required]
                series=series,
                stopped=crossing is not None,
                crossing=a[crossing] if crossing else None,  # type: ignore[literal-required]
            )
            for series, a in runs
        ]

    rates = [
        ("Compliance", "compliance", threshold, f"dashed: threshold, {percent(threshold)}"),
        ("Refusal", "refusal", 1 - threshold, f"dashed: {percent(1 - threshold)} still refuse"),
    ]
    panels = [
        Panel(
            title, lines(key, f"{key}_crossing"), axis, budget, rate=True, level=level, level_label=label,
            description=f"{title} of each model along the attack, {at}",
        )
        for title, key, level, label in rates
    ]  # fmt: skip
    said = f"Loss of each model on harmful targets along the attack, {at}"
    loss = Panel("Harmful loss, nats per token", lines("harmful_loss", None), axis, budget, description=said)
    return [svg(panel) for panel in (*panels, loss)]


def _component_series(index: int) -> int:
    """The colour of part ``index`` of a loss: none of the three models' as long as there are others."""
    return (len(_SERIES) + index) % SERIES


_NO_PARTS = ("step", "loss", "gradient_norm", "ablated", "retain_weight", "rerouting_weight")
"""Of a step's figures those that are not parts of its loss."""


def _training_figures(metrics: Metrics) -> list[dict[str, Any]]:
    """How each model was made: the parts of its loss, or the loss where it has no parts."""
    figures = []
    for name, model in metrics["models"].items():
        curve = [point for point in model["training"]["curve"] if "loss" in point]  # a round of an edit has none
        parts = dict.fromkeys(k for point in curve for k in point if k not in _NO_PARTS)
        keys = list(parts) or ["loss"]
        if not curve:
            continue
        lines = [
            Line([p["step"] for p in curve if k in p], [p[k] for p in curve if k in p], _component_series(i))
            for i, k in enumerate(keys)
        ]
        said = f"Loss of the {name} model along its training"
        steps = max(max(line.x) for line in lines)
        panel = Panel(f"Making {name}: loss by part" if len(keys) > 1 else f"Making {name}: loss", lines,
                      "training steps", steps, markers=False, description=said)  # fmt: skip
        legend = [(_COMPONENTS.get(k, k.replace("_", " ")), _component_series(i)) for i, k in enumerate(keys)]
        figures.append({"legend": legend, "svg": svg(panel)})
    return figures


def _benign_figure(metrics: Metrics, series: dict[str, int]) -> str | None:
    """Held-out loss of the benign task along its fine-tuning, or None where it was not measured."""
    lines = [
        Line(benign["steps"], benign["loss"], series[name])
        for name, model in metrics["models"].items()
        if model["utility"] is not None and (benign := model["utility"]["benign"]) is not None
    ]
    if not lines:
        return None
    said = "Held-out loss of every model along the fine-tuning on a harmless task"
    steps = max(max(line.x) for line in lines)
    return svg(Panel("Benign task: loss, nats per token", lines, "fine-tuning steps", steps, description=said))


def _samples(metrics: Metrics) -> list[tuple[str, list[tuple[str, str]]]]:
    """Each harmless prompt with the answers of all models."""
    prompts: dict[str, list[tuple[str, str]]] = {}
    for model in metrics["models"].values():
        for sample in model["utility"]["samples"] if model["utility"] else ():
            prompts.setdefault(sample["prompt"], []).append((model["label"], sample["answer"]))
    return list(prompts.items())
