"""Groups in this process: contenders are made and warmed up one after another, then take turns.

    python -m fastguard.bench.child JOURNAL DEADLINE [--rehearse] [--states FILE] GROUP...

A contender that raises is written down and the others go on. An error that the device does not recover from ends the
process, with `POISONED`: who started it starts another for those that are left.
"""

from __future__ import annotations

import argparse
import statistics
import time
import traceback
from pathlib import Path

import torch

from fastguard.bench import timing
from fastguard.bench.journal import STATES, Journal
from fastguard.bench.shapes import LLAMA_8B, REHEARSAL, Shapes
from fastguard.bench.work import Absent, Group, Work

POISONED = 3
MARKS = ("CUDA error", "HIP error", "device-side assert", "illegal memory access", "CUBLAS_STATUS_EXECUTION_FAILED")
"""In messages of errors after which every call of the process fails."""


class Poisoned(SystemExit):
    """Raised after an error that the device does not recover from has been written down."""


def seconds(times: list[float]) -> dict[str, float]:
    """What is kept of times."""
    return {"min": min(times), "median": statistics.median(times), "max": max(times), "rounds": len(times)}


def work_through(name: str, group: Group, shapes: Shapes, journal: Journal, deadline: float) -> None:
    """All contenders of a group of which the journal has no last word yet."""
    known = journal.last()
    left = [c for c in group.contenders if not STATES[known.get((name, c), {"state": "begun"})["state"]]]
    if not left:
        return

    def failed(contender: str, error: Exception) -> None:
        said = (str(error) if isinstance(error, Absent) else f"{type(error).__name__}: {error}")[:2000]
        where = traceback.format_exc(limit=-3)[-2000:]
        journal.add(name, contender, "absent" if isinstance(error, Absent) else "failed", error=said, where=where)
        if any(mark in said for mark in MARKS):
            raise Poisoned(POISONED)

    journal.add(name, left[0], "begun")
    try:
        make = group.prepare(shapes)
    except Exception as error:  # what they share cannot be made: none of them has a chance
        for contender in left:
            failed(contender, error)
        return
    ready: dict[str, Work] = {}
    said: dict[str, dict[str, object]] = {}
    warm: dict[str, float] = {}
    clocks = timing.clocks()
    for contender in left:
        if time.time() > deadline:
            journal.add(name, contender, "not reached")
            continue
        journal.add(name, contender, "begun")
        try:
            work = make(contender)
            said[contender] = {"figures": dict(work.figures), "flops": work.flops, "bytes": work.bytes}
            if work.run is None:
                journal.add(name, contender, "done", **said[contender])
                continue
            times, said[contender]["peak_bytes"] = timing.warmed(work.run, shapes.device, shapes.warm)
        except Exception as error:
            failed(contender, error)
            continue
        ready[contender] = work
        warm[contender] = max(times)
        said[contender]["seconds"] = seconds(times)
        journal.add(name, contender, "warm", **said[contender])
    slowest = max(warm.values(), default=1.0)
    rounds = int(min(max(shapes.timed / slowest, shapes.rounds[0]), shapes.rounds[1]))
    found: dict[str, list[float]] = {c: [] for c in ready}
    runs = {c: work.run for c, work in ready.items() if work.run is not None}
    for contender, took in timing.in_turns(runs, shapes.device, rounds):
        if isinstance(took, Exception):
            failed(contender, took)
            del found[contender]
        else:
            found[contender].append(took)
    after = timing.clocks()
    for contender, each in found.items():
        more = {**said[contender], "seconds": seconds(each), "clocks": [clocks, after]}
        journal.add(name, contender, "timed", **more)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m fastguard.bench.child")
    parser.add_argument("journal", type=Path)
    parser.add_argument("deadline", type=float)
    parser.add_argument("groups", nargs="+")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--states", type=Path)
    given = parser.parse_args()
    from fastguard.bench.groups import all_groups

    shapes = REHEARSAL if given.rehearse else LLAMA_8B
    known = all_groups(shapes, given.states)
    for name in given.groups:
        work_through(name, known[name], shapes, Journal(given.journal), given.deadline)
        if shapes.device != "cpu":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
