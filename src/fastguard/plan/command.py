"""``fastguard plan``: from what the user typed to plans, and from plans to a screen or a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastguard import methods
from fastguard.plan import hardware, show
from fastguard.plan.architecture import find
from fastguard.plan.setting import PRECISIONS, Efficiency, Setting
from fastguard.plan.show import Plan
from fastguard.settings import build


def known() -> dict[str, methods.Entry]:
    """The defenses that can be planned, by name."""
    return {name: entry for name, entry in methods.defenses().items() if entry.cost is not None}


def chosen(defense: str) -> methods.Entry:
    """The defense of that name, or of that name with hyphens. Raises ValueError where it cannot be planned."""
    name = defense.replace("-", "_")
    names = ", ".join(known())
    if name in methods.defenses() and name not in known():
        raise ValueError(f"defense: {name} has no cost that could be planned; expected one of {names}")
    if name not in known():
        raise ValueError(f"defense: expected one of {names}, got {defense!r}")
    return known()[name]


def assignments(texts: Sequence[str]) -> dict[str, Any]:
    """A method's options from ``KEY=VALUE``, the values as in YAML. Raises ValueError."""
    import yaml

    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        key = key.strip().replace("-", "_")
        if not key or not equals:
            raise ValueError(f"set: expected KEY=VALUE, got {text!r}")
        if key in found:
            raise ValueError(f"set: {key} is given twice")
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(f"set: {key}: expected a value as in YAML, got {value!r}") from None
    return found


def plans(
    models: Sequence[str], defense: str | None, gpu: str, dtype: str, efficiency: str, job: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
) -> list[Plan]:  # fmt: skip
    """A plan of every model, of the one defense or of all that can be planned.

    Args:
        job: of `Setting`; ``steps`` may be missing, and is then the defense's own.
        options: of the defense, where one is named; those that are missing have their published values.

    Raises:
        FileNotFoundError, ValueError: naming the option, what was given and what was expected.
    """
    options = options or {}
    if defense is None and options:
        raise ValueError(f"set: expected a defense whose options these are, got {', '.join(options)} without one")
    wanted = list(known().values()) if defense is None else [chosen(defense)]
    if dtype not in PRECISIONS:
        raise ValueError(f"dtype: expected one of {', '.join(PRECISIONS)}, got {dtype!r}")
    common = {
        "gpu": hardware.find(gpu), "precision": PRECISIONS[dtype], "efficiency": Efficiency.parse(efficiency),
        "given": frozenset(options), **job,
    }  # fmt: skip
    each = [(entry, build(entry.load_options(), options, "set")) for entry in wanted]
    return [
        show.plan(Setting(architecture, **{"steps": entry.steps, **common}), entry, its)
        for architecture in map(find, models)
        for entry, its in each
    ]


def print_tables(found: Sequence[Plan]) -> None:
    """One plan in full; of several the summary."""
    if len(found) == 1:
        show.show(found[0])
    else:
        show.overview(found)


def write_json(found: Sequence[Plan], where: str) -> str:
    """The document itself for ``-``; else it is written to that file. Returns what is to be printed."""
    text = json.dumps(show.as_document(found), indent=2)
    if where == "-":
        return text
    Path(where).write_text(text + "\n", encoding="utf-8")
    return f"plan: {where}"


def write_table(found: Sequence[Plan], where: str) -> str:
    """The Markdown table itself for ``-``; else it replaces what stands between that file's markers."""
    text = show.markdown(found)
    if where == "-":
        return text
    file = Path(where)
    if not file.is_file():
        raise FileNotFoundError(
            f"table: no file {where!r}; expected a document with the markers {show.START} {show.END}"
        )
    file.write_text(show.rewritten(file.read_text(encoding="utf-8"), text), encoding="utf-8")
    return f"table: {where}"
