"""``fastguard plan``: from what the user typed to plans, and from plans to a screen or a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastguard.plan import hardware, show
from fastguard.plan.architecture import find
from fastguard.plan.defenses import defenses
from fastguard.plan.setting import PRECISIONS, Efficiency, Setting
from fastguard.plan.show import Plan


def plans(
    models: Sequence[str], defense: str | None, gpu: str, dtype: str, efficiency: str, options: dict[str, Any]
) -> list[Plan]:
    """A plan of every model, of the one defense or of all.

    Args:
        options: of `Setting`; ``steps`` may be missing, and is then the defense's own.

    Raises:
        FileNotFoundError, ValueError: naming the option, what was given and what was expected.
    """
    known = defenses()
    if defense is not None and defense not in known:
        raise ValueError(f"defense: expected one of {', '.join(known)}, got {defense!r}")
    if dtype not in PRECISIONS:
        raise ValueError(f"dtype: expected one of {', '.join(PRECISIONS)}, got {dtype!r}")
    common = {
        "gpu": hardware.find(gpu), "precision": PRECISIONS[dtype], "efficiency": Efficiency.parse(efficiency),
        **options,
    }  # fmt: skip
    chosen = list(known.values()) if defense is None else [known[defense]]
    return [
        show.plan(Setting(architecture, **{"steps": one.steps, **common}), one)
        for architecture in map(find, models)
        for one in chosen
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
