"""How far a long run is: a callable ``report(stage, fraction, text)``, drawn by rich where a terminal is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, float, str], None]


def silent(stage: str, fraction: float, text: str) -> None:
    """Report nothing."""


@contextmanager
def rich_progress() -> Iterator[Progress]:
    """One bar per stage; without a terminal, one line per finished stage."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    console = Console()
    bars = Bars(
        TextColumn("{task.description:<28}"),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        TextColumn("{task.fields[text]}", markup=False),
        console=console,
        disable=not console.is_terminal,
    )
    tasks: dict[str, int] = {}

    def report(stage: str, fraction: float, text: str) -> None:
        if not console.is_terminal:
            if fraction >= 1 and stage not in tasks:
                tasks[stage] = 0
                console.print(f"{stage}: {text}", markup=False)
            return
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=1.0, text=text)
        bars.update(bars.task_ids[list(tasks).index(stage)], completed=fraction, text=text)

    with bars:
        yield report
