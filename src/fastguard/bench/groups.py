"""All groups by name, in the order in which they run: what there is no time for is not reached."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from fastguard import proof
from fastguard.bench import head, roofs, states, steps, tune
from fastguard.bench.checks import CHECKS, Case, check
from fastguard.bench.shapes import Shapes
from fastguard.bench.work import Group, Work

MACHINE, CHECK, ROOFS = "machine", "check", "roofs"


def _machine(shapes: Shapes) -> Callable[[str], Work]:
    """Who the device is; what proofs are kept under."""
    import torch

    from fastguard import __version__

    def make(name: str) -> Work:
        figures = {"fastguard": __version__, "device": shapes.device, "torch": str(torch.__version__)}
        if shapes.device != "cpu":
            device = torch.device(shapes.device)
            found = torch.cuda.get_device_properties(device)
            figures |= proof.identity(device)
            figures |= {
                "processors": str(found.multi_processor_count),
                "memory": f"{found.total_memory / 2**30:.0f} GiB",
            }
        return Work(None, figures=figures)

    return make


def _checks(shapes: Shapes) -> Callable[[str], Work]:
    """An op passes in every dtype or raises ArithmeticError; its data are new in every run, and its seed is kept."""

    def make(op: str) -> Work:
        seed = time.time_ns() % 2**31
        for dtype in shapes.checked:
            case = Case(shapes.device, dtype, shapes.check_rows, shapes.hidden, shapes.check_vocabulary, seed)
            wrong = check(op, case)
            if wrong is not None:
                raise ArithmeticError(f"{wrong} (seed {seed})")
        return Work(None, figures={"seed": seed})

    return make


def checks(jobs: int) -> dict[str, Group]:
    """The ops, dealt out to so many processes."""
    return {f"{CHECK} {i + 1}": Group(tuple(CHECKS)[i::jobs], _checks) for i in range(jobs)}


def all_groups(shapes: Shapes, recorded: Path | None = None) -> dict[str, Group]:
    """Every group of a run; recorded: a file of hidden states (``states``)."""
    own = {} if recorded is None else {states.GROUP: states.group(recorded)}
    first = {MACHINE: Group(("facts",), _machine), **tune.groups(shapes), **checks(shapes.jobs)}
    return {**first, ROOFS: roofs.GROUP, **head.GROUPS, **own, **steps.GROUPS}
