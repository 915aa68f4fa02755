"""How far a long run is: a callable ``report(stage, fraction, text)``, drawn by rich where a terminal is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

Progress = Callable[[str, float, str], None]


def silent(stage: str, fraction: float, text: str) -> None:
    """Report nothing."""


@contextmanager
def rich_progress(console: Console | None = None) -> Iterator[Progress]:
    """One bar per stage; where there is no terminal, one line per finished stage."""
    from rich import console as rich_console
    from rich import progress as rich_progress_bars

    shown = console or rich_console.Console()
    bars = rich_progress_bars.Progress(
        rich_progress_bars.TextColumn("{task.description:<36}", markup=False),
        rich_progress_bars.BarColumn(bar_width=24),
        rich_progress_bars.TimeElapsedColumn(),
        rich_progress_bars.TextColumn("{task.fields[text]}", markup=False),
        console=shown,
        disable=not shown.is_terminal,
    )
    tasks: dict[str, rich_progress_bars.TaskID] = {}

    def report(stage: str, fraction: float, text: str) -> None:
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=1.0, text=text)
        bars.update(tasks[stage], completed=fraction, text=text)
        if fraction >= 1 and not shown.is_terminal:
            shown.print(f"{stage}: {text}", markup=False)

    with bars:
        yield report
