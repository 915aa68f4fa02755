"""What the benchmark runs: groups of contenders that do the same work and are timed in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fastguard.bench.shapes import Shapes


class Absent(Exception):
    """Raised for a contender that is not installed, or has nothing for this device: its row says so."""


class Work(NamedTuple):
    """A contender: what is timed (None: making it was the work), and its floor.

    flops, bytes: that cannot be avoided, or that it is compared by; 0 where nothing is. figures: more that it found.
    """

    run: Callable[[], object] | None
    flops: float = 0.0
    bytes: float = 0.0
    figures: Mapping[str, Any] = {}


class Group(NamedTuple):
    """Contenders in the order of their worth.

    prepare: makes what they share, and returns what makes a contender's work; either may raise, as may the work.
    ops: what ``fastguard``'s rest on, by the names of ``CHECKS``: they are unproven where one of them is.
    """

    contenders: tuple[str, ...]
    prepare: Callable[[Shapes], Callable[[str], Work]]
    ops: tuple[str, ...] = ()
