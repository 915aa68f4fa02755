"""Estimates for people (tables), for programs (JSON) and for the documentation (Markdown)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastguard.methods import Entry
from fastguard.plan.estimate import Estimate, as_dict, estimate, usable
from fastguard.plan.parts import held
from fastguard.plan.setting import Setting
from fastguard.settings import Settings

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

NOTE = "Estimates from data sheets and assumed efficiencies. Nothing here was measured on a GPU."


@dataclasses.dataclass(frozen=True)
class Plan:
    """One method with its options on one model: as it is here, and as it was published."""

    entry: Entry
    options: Settings
    here: Estimate
    published: Estimate

    @property
    def setting(self) -> Setting:
        """What both were planned for."""
        return self.here.setting


def plan(s: Setting, entry: Entry, options: Settings) -> Plan:
    """Both estimates. Raises ValueError where the planner does not know the method."""
    cost = entry.load_cost()
    return Plan(entry, options, estimate(s, cost, options), estimate(s, cost, options, published=True))


def as_document(plans: Sequence[Plan]) -> dict[str, Any]:
    """JSON's plain values: bytes, flops, seconds, all of one GPU unless the name says otherwise."""

    def one(p: Plan) -> dict[str, Any]:
        s = p.setting
        a = s.architecture
        setting = {f.name: getattr(s, f.name) for f in dataclasses.fields(s)}
        setting["given"] = sorted(s.given)
        setting["architecture"] = {**dataclasses.asdict(a), "parameters": a.parameters}
        for name in ("gpu", "precision", "efficiency"):
            setting[name] = dataclasses.asdict(setting[name])
        return {
            "model": a.name,
            "defense": p.entry.name,
            "options": p.options.to_dict(),
            "steps_source": p.entry.steps_source if s.steps == p.entry.steps else "given",
            "setting": setting,
            "usable_bytes": usable(s),
            "fastguard": as_dict(p.here),
            "published": as_dict(p.published),
        }

    return {"note": NOTE, "plans": [one(p) for p in plans]}


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
    """Print the summary, memory and parts of a plan as tables."""
    from rich.console import Console

    console = console or Console()
    s = p.setting
    a = s.architecture
    trained = "all weights" if s.lora is None else f"LoRA, rank {s.lora} ({s.trainable / 1e6:,.1f}M weights)"
    chosen = f" ({said})" if (said := p.options.describe()) else ""
    console.print(
        f"[bold]{p.entry.name}[/bold]{chosen} on [bold]{a.name}[/bold] ({a.parameters / 1e9:,.2f}B parameters), "
        f"{s.gpus} x {s.gpu.name}, FSDP2; {trained}, {s.precision.name} precision, "
        f"{'' if s.checkpointing else 'no '}activation checkpointing; "
        f"{s.batch} sequences of {s.tokens} tokens a GPU and batch"
    )
    console.print(f"[yellow]{NOTE}[/yellow]")
    for deviation in p.here.recipe.deviations:
        console.print(f"[yellow]{deviation}.[/yellow]")
    console.print(_summary(p))
    console.print(_memory(p))
    for name, e in (("fastguard", p.here), ("published code", p.published)):
        console.print(_parts(name, e))
    assumed = s.efficiency
    console.print(
        f"Assumed: products at {assumed.matmul:.0%} of {s.gpu.flops / 1e12:,.0f} Tflop/s, memory at "
        f"{assumed.memory:.0%} of {s.gpu.bandwidth / 1e12:.2f} TB/s, collectives at {assumed.network:.0%} of "
        f"{s.gpu.collective(s.gpus) / 1e9:,.0f} GB/s, host at {assumed.host:.0%} of {s.gpu.host / 1e9:.0f} GB/s; "
        f"collectives hide behind {assumed.overlap:.0%} of a part's products. Data sheets: {s.gpu.source}. "
        "--efficiency changes these."
    )


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table


def _summary(p: Plan) -> Table:
    s = p.setting
    table = _table("In short", "", "fastguard", "published code")
    both = (p.here, p.published)
    fits = [f"{gigabytes(e.memory)} GB{'' if e.fits else ', does not fit'}" for e in both]
    table.add_row(f"memory of a GPU ({gigabytes(usable(s))} GB usable)", *fits)
    table.add_row("largest batch that fits, sequences a GPU", *(str(e.largest or "none") for e in both))
    table.add_row("step", *(seconds(e.seconds) for e in both))
    where = p.entry.steps_source if s.steps == p.entry.steps else "given"
    table.add_row(f"run of {s.steps:,} steps ({where})", *(duration(e.hours) for e in both))
    table.add_row("GPU hours", *(f"{e.hours * s.gpus:,.0f}" for e in both))
    table.add_row("host memory for a GPU", *(f"{gigabytes(e.host)} GB" if e.host else "-" for e in both))
    return table


def _memory(p: Plan) -> Table:
    table = _table("Memory of one GPU, GB, at the worst moment; (in brackets) held at another", "", "fastguard",
                   "published code")  # fmt: skip
    columns = []
    for e in (p.here, p.published):
        now: dict[str, float] = {}
        for i in held(e.recipe.items, e.moment):
            now[i.name] = now.get(i.name, 0.0) + i.bytes
        later: dict[str, float] = {}
        for i in e.recipe.items:
            later[i.name] = max(later.get(i.name, 0.0), i.bytes)
        columns.append({n: gigabytes(now[n]) if now.get(n) else f"({gigabytes(b)})" for n, b in later.items() if b})
    size = {i.name: i.bytes for e in (p.published, p.here) for i in e.recipe.items if i.bytes}
    host = {i.name for e in (p.here, p.published) for i in e.recipe.items if i.host}
    names = dict.fromkeys([*columns[0], *columns[1]])
    for name in sorted(names, key=lambda n: -size[n]):
        table.add_row(f"{name}{' (host)' if name in host else ''}", *(column.get(name, "") for column in columns))
    table.add_section()
    table.add_row("in all", *(gigabytes(e.memory) for e in (p.here, p.published)))
    table.add_row("moment", *(e.moment for e in (p.here, p.published)))
    return table


def _parts(name: str, e: Estimate) -> Table:
    table = _table(
        f"A step of {name}, one GPU's share", "", "times", "Tflop", "memory GB", "network GB", "host GB", "time"
    )

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


COLUMNS = ("model", "defense", "GB a GPU", "published", "step", "published", "steps", "run", "published",
           "largest batch", "published")  # fmt: skip


def _rows(plans: Sequence[Plan]) -> list[list[str]]:
    rows = []
    for p in plans:
        both = (p.here, p.published)
        memory = [f"{gigabytes(e.memory)}{'' if e.fits else ' (too much)'}" for e in both]
        step, run = [seconds(e.seconds) for e in both], [duration(e.hours) for e in both]
        largest = [str(e.largest or "none") for e in both]
        rows.append([p.setting.architecture.name, p.entry.name, *memory, *step, f"{p.setting.steps:,}", *run, *largest])
    return rows


def _conditions(s: Setting) -> str:
    e = s.efficiency
    return (
        f"{s.gpus} x {s.gpu.name} ({gigabytes(usable(s))} GB usable each), FSDP2, {s.precision.name} precision, "
        f"{'all weights' if s.lora is None else f'LoRA rank {s.lora}'}, activation checkpointing "
        f"{'on' if s.checkpointing else 'off'}, {s.batch} sequences of {s.tokens} tokens a GPU and batch. "
        f"Products at {e.matmul:.0%} of peak, memory {e.memory:.0%}, collectives {e.network:.0%}, host {e.host:.0%}."
    )


def overview(plans: Sequence[Plan], console: Console | None = None) -> None:
    """Print a line per plan."""
    from rich.console import Console

    console = console or Console()
    console.print(_conditions(plans[0].setting))
    console.print(f"[yellow]{NOTE}[/yellow]")
    table = _table("", *COLUMNS)
    for row in _rows(plans):
        table.add_row(*row)
    console.print(table)


def markdown(plans: Sequence[Plan]) -> str:
    """The same as a Markdown table."""
    lines = [f"{_conditions(plans[0].setting)} **{NOTE}**", ""]
    lines += [_markdown_row(COLUMNS), "|" + "---|" * len(COLUMNS)]
    return "\n".join(lines + [_markdown_row(row) for row in _rows(plans)])


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
