"""The journal as Markdown: what passed its check, the roofs, and a table a group with fractions of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastguard.bench import roofs, steps, tune
from fastguard.bench.groups import CHECK, MACHINE, ROOFS
from fastguard.bench.work import Group

Line = Mapping[str, Any]
Last = Mapping[tuple[str, str], Line]

LAYERS = 32
"""Of the model whose layers these are."""


def markdown(last: Last, groups: Mapping[str, Group]) -> str:
    """All of it; groups that have no line yet are left out."""
    facts = last[MACHINE, "facts"]["figures"]
    lines = ["# First contact with a GPU", "", ", ".join(f"{key} {value}" for key, value in facts.items()), ""]
    lines += [*check_lines(last), ""]
    roof = {name: rate(last.get((ROOFS, name), {}), kind) for name, kind in KINDS.items()}
    for name, group in groups.items():
        if (name, group.contenders[0]) in last and not name.startswith((MACHINE, tune.FIT, CHECK)):
            lines += [f"## {name}", "", *group_lines(name, group, last, roof), ""]
    return "\n".join([*lines, *layer_lines(last)]).rstrip() + "\n"


KINDS = {roofs.GEMM: "flops", roofs.COPY: "bytes"}
"""What a roof is a rate of."""


def rate(line: Line, kind: str) -> float:
    """Flops or bytes a second; 0 where they or the time are not known."""
    return float(line.get(kind, 0.0) / line["seconds"]["median"]) if "seconds" in line else 0.0


def check_lines(last: Last) -> Iterator[str]:
    """Each op, and whether it agrees with float64."""
    yield from row(["op", "against float64"], head=True)
    for (group, op), line in last.items():
        if group.startswith(CHECK):
            yield from row([op, "agrees" if line["state"] == "done" else f"**unproven**: {note(line)}"])


def note(line: Line) -> str:
    """Why a contender has no times."""
    said = " ".join(line.get("error", "").split()).replace("|", "\\|")[:300]
    return {"timed": "", "done": "", "warm": "warm-up only", "begun": "at work"}.get(
        line["state"], line["state"] + (f": {said}" if said else "")
    )


def group_lines(name: str, group: Group, last: Last, roof: Mapping[str, float]) -> Iterator[str]:
    """A row a contender; columns that no row has are left out. Then the kernels, where a contender counted them."""
    lines = {c: last[name, c] for c in group.contenders if (name, c) in last}
    agree = {op for (of, op), line in last.items() if of.startswith(CHECK) and line["state"] == "done"}
    doubt = [op for op in group.ops if op not in agree]
    times = {c: line["seconds"]["median"] for c, line in lines.items() if "seconds" in line}
    first = next((times[base] for base in ("eager", steps.PLAIN[0], *times) if base in times), 0.0)

    def cells(c: str) -> dict[str, str]:
        line, figures = lines[c], lines[c].get("figures", {})
        found = dict.fromkeys(COLUMNS, "")
        notes = [note(line)] + ([f"**unproven**: {', '.join(doubt)}"] if doubt and c.startswith("fastguard") else [])
        found |= {"contender": c, "note": "; ".join(filter(None, notes))}
        found |= {key: f"{figures[key]:.2g}" for key in ("live", "entropy", "gradient error") if key in figures}
        if c in times:
            spent = line["seconds"]
            found["median ms"] = milliseconds(spent["median"])
            found["min to max"] = f"{milliseconds(spent['min'])} to {milliseconds(spent['max'])}"
            found["ratio"] = f"{times[c] / first:.2f}"
        if line.get("peak_bytes") is not None:
            found["peak MB"] = f"{line['peak_bytes'] / 1e6:,.0f}"
        for at, kind in KINDS.items():
            if line.get(kind) and c in times and roof[at]:
                found[f"of the {at}"] = f"{rate(line, kind) / roof[at]:.0%}"
                found["rate"] = f"{rate(line, kind) / 1e12:.3g} T{kind.removesuffix('s')}/s"
        return found

    table = [cells(c) for c in lines]
    shown = [column for column in COLUMNS if any(each[column] for each in table)]
    yield from row(shown, head=True)
    for each in table:
        yield from row([each[column] for column in shown])
    for line in lines.values():
        if "clocks" in line and any(line["clocks"]):
            before, after = (", ".join(each.values()) for each in line["clocks"])
            yield from ("", f"Clocks, temperature, power, throttling: before {before}; after {after}.")
            break
    for c, line in lines.items():
        if "kernels" in line.get("figures", {}):
            spent = ", ".join(f"`{key}` {value:.3g}" for key, value in line["figures"]["kernels"].items())
            yield from ("", f"Kernels of {c}, ms: {spent}.")


COLUMNS = (
    "contender", "median ms", "min to max", "ratio", "peak MB", "rate", *(f"of the {name}" for name in KINDS),
    "live", "entropy", "gradient error", "note",
)  # fmt: skip


def layer_lines(last: Last) -> Iterator[str]:
    """What a layer costs each step, by the two depths, and a step of `LAYERS` of them, which is extrapolated."""
    found = []
    for contender in steps.CONTENDERS:
        lines = [last.get((group, contender), {}) for group in (steps.FEWER, steps.MORE)]
        if all("seconds" in line for line in lines):
            (few, a), (more, b) = ((line["figures"]["layers"], line["seconds"]["median"]) for line in lines)
            layer = (b - a) / (more - few)
            found.append([contender, milliseconds(layer), milliseconds(a + (LAYERS - few) * layer)])
    if found:
        yield from ("## What a layer costs", "")
        yield from row(["step", "ms a layer", f"ms at {LAYERS} layers, extrapolated"], head=True)
        for each in found:
            yield from row(each)


def milliseconds(seconds: float) -> str:
    """Three digits."""
    return f"{1e3 * seconds:,.3g}" if abs(seconds) < 1 else f"{1e3 * seconds:,.0f}"


def row(cells: list[str], head: bool = False) -> Iterator[str]:
    """A line of a table, and the one beneath its head."""
    yield f"| {' | '.join(cells)} |"
    if head:
        yield "|---" * len(cells) + "|"
