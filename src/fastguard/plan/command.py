"""``fastguard plan``: from what the user typed to plans, and from plans to a screen or a file."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastguard import methods
from fastguard.plan import hardware, show
from fastguard.plan.architecture import Architecture, find
from fastguard.plan.setting import PRECISIONS, Efficiency, Setting
from fastguard.plan.show import Plan
from fastguard.settings import Settings, build


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


RUN = ("global_batch", "tokens", "samples", "epochs", "steps")
"""Keys of a job that describe the run. Those that are missing are the published ones, each method's own."""


def plans(
    models: Sequence[str], defense: str | None, gpu: str, dtype: str, efficiency: str, job: Mapping[str, Any],
    options: Mapping[str, Any] | None = None, *, without: Sequence[str] = (), deviations: Sequence[str] | None = None,
) -> list[Plan]:  # fmt: skip
    """A plan of every model, of the one defense or of all that can be planned.

    Args:
        job: of `Setting`, and of `RUN`: ``samples`` of an epoch, ``epochs``, or ``steps`` in their place.
        options: of the defense, where one is named; those that are missing have their published values.
        without: exact levers that are left as they are. deviations: those that are planned, several at once with ``+``
            between them; None: each that changes the plan.

    Raises:
        FileNotFoundError, ValueError: naming the option, what was given and what was expected.
    """
    options = options or {}
    if defense is None and options:
        raise ValueError(f"set: expected a defense whose options these are, got {', '.join(options)} without one")
    wanted = list(known().values()) if defense is None else [chosen(defense)]
    if dtype not in PRECISIONS:
        raise ValueError(f"dtype: expected one of {', '.join(PRECISIONS)}, got {dtype!r}")
    given = {key: job[key] for key in RUN if job.get(key) is not None}
    common = {
        "gpu": hardware.find(gpu), "precision": PRECISIONS[dtype], "efficiency": Efficiency.parse(efficiency),
        "given": frozenset(options), **{key: value for key, value in job.items() if key not in RUN},
    }  # fmt: skip
    each = [(entry, build(entry.load_options(), options, "set")) for entry in wanted]
    left = frozenset(without)
    return [
        show.plan(scheduled(architecture, entry, its, common, given), entry, its, left, deviations, bool(given))
        for architecture in map(find, models)
        for entry, its in each
    ]


def scheduled(
    architecture: Architecture, entry: methods.Entry, options: Settings, common: Mapping[str, Any],
    given: Mapping[str, Any],
) -> Setting:  # fmt: skip
    """The job of a method: its published run with what was given in its place.

    Micro-batches may be given in the job or, where a method has them, among its options.

    Steps are the samples of all epochs by what the GPUs take at a time, which is at least one sequence each.
    """
    if "steps" in given and ("samples" in given or "epochs" in given):
        raise ValueError("steps: expected it without samples and epochs, of which steps follow")
    for name in ("samples", "epochs"):
        if name in given and not 0 < given[name] < math.inf:
            raise ValueError(f"{name}: expected a number above 0, got {given[name]}")
    micro = common["micro"] if common.get("micro") is not None else getattr(options, "micro", None)
    s = Setting(
        architecture, global_batch=given.get("global_batch", entry.batch), tokens=given.get("tokens", entry.tokens),
        steps=given.get("steps", 1), **{**common, "micro": micro},
    )  # fmt: skip
    if "steps" in given:
        return s
    samples = given.get("samples", entry.steps * entry.batch / entry.epochs) * given.get("epochs", entry.epochs)
    return dataclasses.replace(s, steps=math.ceil(samples / (s.batch * s.gpus)))


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
