"""Estimates for people (tables), for programs (JSON) and for the documentation (Markdown)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastguard.methods import Entry
from fastguard.plan import levers
from fastguard.plan.estimate import Estimate, as_dict, divided, estimate, usable
from fastguard.plan.parts import held
from fastguard.plan.setting import Setting
from fastguard.settings import Settings

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

NOTE = "Estimates from data sheets and published or assumed efficiencies. Nothing here was measured on a GPU."


@dataclasses.dataclass(frozen=True)
class Plan:
    """One method with its options on one model: as published, exact, and with each deviation.

    Attributes:
        job: as it was asked for, without levers.
        without: the exact estimate without each of its levers that makes a difference, by the lever's name.
        given: whether the run was asked for, and is not the published one.
    """

    entry: Entry
    options: Settings
    job: Setting
    published: Estimate
    exact: Estimate
    deviations: dict[str, Estimate]
    without: dict[str, Estimate]
    given: bool

    @property
    def setting(self) -> Setting:
        """The job, with the exact levers."""
        return self.exact.setting

    @property
    def columns(self) -> dict[str, Estimate]:
        """All estimates by name."""
        return {"published": self.published, "exact": self.exact, **self.deviations}

    @property
    def source(self) -> str:
        """Where the run is from."""
        return "as given" if self.given else self.entry.steps_source

    @property
    def notes(self) -> list[str]:
        """In what the plan is not of the job and the options as they stand."""
        s = self.setting
        found = [*s.rounded("batch", s.global_batch), *self.exact.recipe.deviations]
        if self.job.micro is not None and s.micro is None:
            found.append(f"micro: {self.entry.name} is not known to take {self.job.micro} at a time; batches are whole")
        return found


def plan(
    s: Setting, entry: Entry, options: Settings, without: frozenset[str] = frozenset(),
    deviations: Sequence[str] | None = None, given: bool = False,
) -> Plan:  # fmt: skip
    """All estimates; arguments as of ``command.plans``, which says what is raised."""
    cost = entry.load_cost()
    pulled = levers.exact(s, without)
    exact = estimate(divided(pulled, cost, options), cost, options)
    settings = {n: lever.released(exact.setting) for n, lever in levers.EXACT.items() if n not in without}
    settings[levers.MICRO] = dataclasses.replace(exact.setting, micro=None)
    found = {}
    for name in levers.DEVIATIONS if deviations is None else deviations:
        try:
            e = estimate(divided(levers.deviation(pulled, name), cost, options), cost, options)
        except ValueError:
            if deviations is None:  # those that this job cannot have
                continue
            raise
        if _differ(e, exact):
            found[name] = e
        elif deviations is not None:
            raise ValueError(f"deviation: expected one that {entry.name} has here, got {name!r}, which changes nothing")
    each = {name: estimate(setting, cost, options) for name, setting in settings.items()}
    return Plan(
        entry, options, s, estimate(s, cost, options, published=True), exact, found,
        {name: e for name, e in each.items() if _differ(e, exact)}, given,
    )  # fmt: skip


def _differ(one: Estimate, other: Estimate) -> bool:
    return (one.recipe.parts, one.recipe.items) != (other.recipe.parts, other.recipe.items)


def _named(lever: str) -> str:
    """For readers: the name of a lever, or of several, and whether it can be run."""
    return lever.replace("_", " ").replace("+", " + ") + levers.built(lever)


def as_document(plans: Sequence[Plan]) -> dict[str, Any]:
    """JSON's plain values: bytes, flops, seconds, all of one GPU unless the name says otherwise."""

    def one(p: Plan) -> dict[str, Any]:
        s = p.setting
        a = s.architecture
        setting = {f.name: getattr(s, f.name) for f in dataclasses.fields(s)}
        setting["given"] = sorted(s.given)
        setting["architecture"] = {**dataclasses.asdict(a), "parameters": a.parameters}
        for name in ("gpu", "precision"):
            setting[name] = dataclasses.asdict(setting[name])
        setting["efficiency"] = {**dataclasses.asdict(s.efficiency), "matmul": s.matmul}
        return {
            "model": a.name,
            "defense": p.entry.name,
            "options": p.options.to_dict(),
            "steps_source": p.source,
            "setting": {**setting, "batch": s.batch},
            "notes": p.notes,
            "usable_bytes": usable(s),
            "published": as_dict(p.published),
            "exact": as_dict(p.exact),
            "deviations": {name: as_dict(e) for name, e in p.deviations.items()},
            "exact_without": {name: as_dict(e) for name, e in p.without.items()},
        }

    return {"note": NOTE, "not_built": sorted(levers.NOT_BUILT), "plans": [one(p) for p in plans]}


def gigabytes(size: float) -> str:
    """In units of 1e9 bytes."""
    return f"{size / 1e9:,.0f}" if size >= 1e11 else f"{size / 1e9:,.1f}" if size >= 5e7 else f"{size / 1e9:.3f}"


def duration(hours: float) -> str:
    """In the largest unit of which there is at least one and a half."""
    for unit, size in (("d", 24.0), ("h", 1.0), ("min", 1 / 60)):
        if hours >= 1.5 * size:
            return f"{hours / size:,.1f} {unit}"
    return f"{hours * 3600:,.1f} s"


def seconds(value: float) -> str:
    """Seconds, or milliseconds below a tenth."""
    return f"{value:,.1f} s" if value >= 10 else f"{value:,.2f} s" if value >= 0.1 else f"{value * 1e3:,.1f} ms"


def show(p: Plan, console: Console | None = None) -> None:
    """Print the summary, levers, memory and parts of a plan as tables."""
    from rich.console import Console

    console = console or Console()
    s = p.setting
    a = s.architecture
    chosen = f" ({said})" if (said := p.options.describe()) else ""
    console.print(
        f"[bold]{p.entry.name}[/bold]{chosen} on [bold]{a.name}[/bold] ({a.parameters / 1e9:,.2f}B parameters), "
        f"{s.gpus} x {s.gpu.name}, FSDP2; {_trained(s)}, {s.precision.name} precision, "
        f"{'' if s.checkpointing else 'no '}activation checkpointing",
        highlight=False,
    )
    console.print(f"{s.steps:,} steps of {s.global_batch} x {s.tokens} tokens: {p.source}", highlight=False)
    for note in (*p.notes, NOTE.rstrip(".")):
        console.print(f"[yellow]{note}.[/yellow]", highlight=False)
    for table in (_summary(p), _levers(p), _memory(p), _parts(p.exact)):
        console.print(table)
    e = s.efficiency
    console.print(
        f"Products at {s.matmul:.0%} of {s.gpu.flops / 1e12:,.0f} Tflop/s ({_efficiency_source(s)}); assumed: memory "
        f"at {e.memory:.0%} of {s.gpu.bandwidth / 1e12:.2f} TB/s, collectives at {e.network:.0%} of "
        f"{s.gpu.collective(s.gpus) / 1e9:,.0f} GB/s, host at {e.host:.0%} of {s.gpu.host / 1e9:.0f} GB/s; collectives "
        f"hide behind {e.overlap:.0%} of a part's products. --efficiency changes these. Peaks: {s.gpu.source}.",
        highlight=False,
    )


def _trained(s: Setting) -> str:
    return "all weights" if s.lora is None else f"LoRA, rank {s.lora} ({s.trainable / 1e6:,.1f}M weights)"


def _efficiency_source(s: Setting) -> str:
    return s.gpu.throughput.source if s.efficiency.matmul is None else "as given"


def _table(title: str, *columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", vertical="bottom" if i else "top")
    return table


def _summary(p: Plan) -> Table:
    s, each = p.setting, list(p.columns.values())
    table = _table("In short", "", *(name.replace("_", "\n").replace("+", "\n+ ") for name in p.columns))
    table.padding, table.columns[0].no_wrap = (0, 1, 0, 0), True
    table.add_row(f"GB a GPU (of {gigabytes(usable(s))})", *(gigabytes(e.memory) for e in each))
    table.add_row("fewest GPUs that fit", *(_fewest(e) for e in each))
    table.add_row("step", *(seconds(e.seconds) for e in each))
    table.add_row("run", *(duration(e.hours) for e in each))
    table.add_row("GPU hours", *(f"{e.hours * s.gpus:,.0f}" for e in each))
    table.add_row("bound by", *(e.bound[0] for e in each))
    table.add_row("  by a factor of", *(f"{e.bound[1]:,.1f}x" for e in each))
    table.add_row("host GB for a GPU", *(gigabytes(e.host) if e.host else "-" for e in each))
    if any(e.setting.micro for e in each):
        table.add_row("sequences at a time", *(str(e.setting.micro or "all") for e in each))
    table.add_row("can be run", "-", *(_runs(p, name) for name in list(p.columns)[1:]))
    return table


def _runs(p: Plan, name: str) -> str:
    """Whether the levers of the exact column that make a difference, or those of a deviation, are built."""
    if name != "exact":
        return "no" if levers.built(name) else "yes"
    return "in part" if levers.NOT_BUILT & p.without.keys() else "yes"


def _fewest(e: Estimate) -> str:
    return "none" if e.fewest is None else str(e.fewest)


def bound(e: Estimate) -> str:
    """What binds, and how many times what comes next, or what there is."""
    name, times = e.bound
    return f"{name} {times:,.1f}x"


def _levers(p: Plan) -> Table:
    table = _table("What each lever buys", "")
    table.add_column("")
    table.add_column("GB of a GPU", justify="right")
    table.add_column("step", justify="right")
    said = {name: lever.says for name, lever in {**levers.EXACT, **levers.DEVIATIONS}.items()}
    said[levers.MICRO] = f"{p.setting.micro} sequences at a time"

    def row(name: str, more: Estimate, less: Estimate) -> None:
        memory, time = (less.memory - more.memory) / 1e9, less.seconds / more.seconds - 1
        what = ", and ".join(said[n] for n in name.split("+"))
        table.add_row(_named(name), what, f"{memory:+,.1f}", f"{time:+.1%}")

    for name, e in p.without.items():
        row(name, e, p.exact)
    table.add_section()
    for name, e in p.deviations.items():
        row(name, p.exact, e)
    return table


def _memory(p: Plan) -> Table:
    table = _table("Memory of one GPU, GB; (in brackets) not at the worst moment", "", "published", "exact")
    columns = []
    both = (p.published, p.exact)
    for e in both:
        now: dict[str, float] = {}
        for i in held(e.recipe.items, e.moment):
            now[i.name] = now.get(i.name, 0.0) + i.bytes
        later: dict[str, float] = {}
        for i in e.recipe.items:
            later[i.name] = max(later.get(i.name, 0.0), i.bytes)
        host = {i.name for i in e.recipe.items if i.host and i.bytes}
        columns.append({
            n: gigabytes(now[n]) if now.get(n) else f"({gigabytes(b)}{' host' if n in host else ''})"
            for n, b in later.items() if b
        })  # fmt: skip
    size = {i.name: i.bytes for e in both for i in e.recipe.items if i.bytes}
    names = dict.fromkeys([*columns[1], *columns[0]])
    for name in sorted(names, key=lambda n: -size[n]):
        table.add_row(name, *(column.get(name, "") for column in columns))
    table.add_section()
    table.add_row("in all", *(gigabytes(e.memory) for e in both))
    table.add_row("moment", *(e.moment for e in both))
    return table


def _parts(e: Estimate) -> Table:
    table = _table("A step, exact, one GPU's share", "", "times", "Tflop", "memory GB", "network GB", "host GB", "time")

    def cell(value: float, unit: float) -> str:
        return f"{value / unit:,.2f}" if value / unit < 100 else f"{value / unit:,.0f}"

    def numbers(of: Any) -> list[str]:
        sizes = [(of.flops, 1e12), (of.memory, 1e9), (of.network, 1e9), (of.host, 1e9)]
        return [cell(value, unit) if value else "" for value, unit in sizes]

    for part in e.recipe.parts:
        table.add_row(part.name, f"{part.count:g}", *numbers(part), seconds(part.seconds(e.setting)))
    table.add_section()
    totals = {f: sum(getattr(p, f) for p in e.recipe.parts) for f in ("flops", "memory", "network", "host")}
    row = [cell(totals[f], 1e12 if f == "flops" else 1e9) for f in totals]
    table.add_row("in all", "", *row, seconds(e.seconds))
    return table


COLUMNS = ("defense", "steps", "batch", "tokens", "GB a GPU, published", "exact", "fewest GPUs, published", "exact",
           "run, published", "exact", "bound by")  # fmt: skip


def _rows(plans: Sequence[Plan]) -> list[list[str]]:
    """For each plan, and below it for each of its deviations, the cells of `COLUMNS`.

    A deviation stands in the exact columns.
    """
    rows = []
    for p in plans:
        s = p.setting
        whole = s.batch * s.gpus
        rounded = "" if whole == s.global_batch else f" ({whole})"
        run = [f"{s.steps:,}", f"{s.global_batch}{rounded}", str(s.tokens)]
        rows.append([p.entry.name, *run, *_pairs(p.published, p.exact), bound(p.exact)])
        rows += [[f"+ {_named(n)}", "", "", "", *_pairs(None, e), bound(e)] for n, e in p.deviations.items()]
    return rows


def _pairs(published: Estimate | None, e: Estimate) -> list[str]:
    def cells(e: Estimate | None) -> tuple[str, ...]:
        if e is None:
            return ("", "", "")
        return f"{gigabytes(e.memory)}{'' if e.fits else ' (too much)'}", _fewest(e), duration(e.hours)

    return [cell for pair in zip(cells(published), cells(e), strict=True) for cell in pair]


def _conditions(s: Setting) -> str:
    e = s.efficiency
    pulled = ", ".join(map(_named, (*(name for name, at in levers.EXACT.items() if at.pulled(s) == s), levers.MICRO)))
    return (
        f"{s.gpus} x {s.gpu.name} ({gigabytes(usable(s))} GB usable each), FSDP2, {s.precision.name} precision, "
        f"{_trained(s)}, activation checkpointing {'on' if s.checkpointing else 'off'}. Batches are "
        f"global; in brackets what they are rounded up to, a sequence a GPU. Products at {s.matmul:.0%} of peak, "
        f"memory {e.memory:.0%}, collectives {e.network:.0%}, host {e.host:.0%}. Exact levers: {pulled}."
    )


def overview(plans: Sequence[Plan], console: Console | None = None) -> None:
    """Print a line per plan and deviation."""
    from rich.console import Console

    console = console or Console()
    console.print(_conditions(plans[0].setting), highlight=False)
    console.print(f"[yellow]{NOTE}[/yellow]")
    for name, of_model in _by_model(plans).items():
        table = _table(
            name, *(column.replace(" a GPU", "").replace("published", "paper").replace(" ", "\n") for column in COLUMNS)
        )
        table.padding, table.columns[0].no_wrap = 0, True
        for cells in _rows(of_model):
            table.add_row(
                cells[0].replace("+ ", "+").replace(" adversary", "").replace(" (not built)", "*"), *cells[1:]
            )
        console.print(table)
    console.print("paper: as published; +: a deviation from the exact step above; *: not built", highlight=False)


def _by_model(plans: Sequence[Plan]) -> dict[str, list[Plan]]:
    found: dict[str, list[Plan]] = {}
    for p in plans:
        found.setdefault(p.setting.architecture.name, []).append(p)
    return found


def markdown(plans: Sequence[Plan]) -> str:
    """The same as a Markdown table."""
    heads = ("model", *COLUMNS)
    lines = [f"{_conditions(plans[0].setting)} **{NOTE}**", "", _markdown_row(heads), "|" + "---|" * len(heads)]
    for name, of_model in _by_model(plans).items():
        lines += [_markdown_row([name, *cells]) for cells in _rows(of_model)]
    return "\n".join(lines)


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


START, END = "<!-- plan:headline -->", "<!-- /plan:headline -->"


def rewritten(document: str, table: str) -> str:
    """The document with the table between its markers. Raises ValueError where it has none."""
    before, start, rest = document.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise ValueError(f"table: expected a document with the markers {START} and {END}")
    return f"{before}{START}\n{table}\n{END}{after}"
