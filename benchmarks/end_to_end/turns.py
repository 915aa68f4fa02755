"""Contenders that take turns, each round of each in a process of its own, whose start is not timed.

A script does the work: ``script CONTENDER ROUNDS`` ends with a line of JSON: ``seconds`` of the rounds, ``peak_bytes``
above the model, and what else there is to compare. Peaks come from processes that give freed memory back to the system
at once: what is live counts.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import measure
from end_to_end.nested_step import row

TRIMMED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def worked(once: Callable[[], object], rounds: int) -> dict[str, Any]:
    """What a script says of its work: the peak of a round that is not timed, and the seconds of others."""
    found: dict[str, Any] = {"seconds": [], "peak_bytes": measure.peak_bytes(once)}
    for _ in range(rounds):
        start = time.perf_counter()
        once()
        found["seconds"].append(time.perf_counter() - start)
    return found


def measured(script: str, contender: str, rounds: int, **environment: str) -> dict[str, Any]:
    """What a contender's process says in the end."""
    command = [sys.executable, script, contender, str(rounds)]
    out = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)
    assert out.returncode == 0, out.stderr[-3000:]
    found: dict[str, Any] = json.loads(out.stdout.splitlines()[-1])
    return found


def in_turns(
    benchmark: Any, script: str, contenders: Sequence[str], own: str, against: str, rounds: int
) -> dict[str, dict[str, Any]]:
    """Time all, tell the benchmark the figures of ``own`` and, beside it, of the others; what each said last."""
    seconds: dict[str, list[float]] = {c: [] for c in contenders}
    said: dict[str, dict[str, Any]] = {}

    def one_round() -> None:
        for c in contenders:
            said[c] = measured(script, c, 1)
            seconds[c] += said[c]["seconds"]

    benchmark.pedantic(one_round, rounds=rounds)
    peaks = {c: measured(script, c, 1, **TRIMMED)["peak_bytes"] for c in contenders}
    ratio = {c: statistics.median(s / f for s, f in zip(seconds[c], seconds[against], strict=True)) for c in contenders}
    rows = {c: row(c, seconds[c], ratio[c], peaks[c]) for c in contenders}
    benchmark.extra_info.update(rows[own], beside=[rows[c] for c in contenders if c != own])
    return said
