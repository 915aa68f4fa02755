"""Levers: ways to need less memory or less time, by name, and which of them can be run.

An exact one leaves a step's numbers as they are, but for the order of sums; a deviation is another estimate of the
gradient, and what it buys in safety has to be measured. What each does is in ``setting.Setting``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastguard.plan.setting import Setting


@dataclass(frozen=True)
class Lever:
    """Fields of a `Setting` and what they are when it is pulled. says: to a reader, in a line."""

    name: str
    changes: Mapping[str, Any]
    says: str

    def pulled(self, s: Setting) -> Setting:
        """The job with it."""
        return dataclasses.replace(s, **self.changes)

    def released(self, s: Setting) -> Setting:
        """The job without it."""
        before: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(s) if f.name in self.changes}
        return dataclasses.replace(s, **before)


_EXACT = (
    Lever("late_head", {"late_head": True}, "head gathered at first use, released, its gradient reduced in blocks"),
    Lever("own_groups", {"own_groups": True}, "embedding, and norm with head, sharded as groups of their own"),
    Lever("snapshot_on_host", {"snapshot": "host"}, "the original waits in host memory during an attack"),
    Lever("outer_on_host", {"outer": "host"}, "the outer optimizer's moments wait there too"),
    Lever("states_on_host", {"reference": "host"}, "the reference's hidden states wait there for the live ones"),
)
_DEVIATIONS = (
    Lever("bf16_reductions", {"attack_reduce": 2}, "attackers' gradients are added up in bf16"),
    Lever("bf16_moments", {"attack_moments": 2}, "attackers' optimizers keep their moments in bf16"),
    Lever(
        "lora_adversary",
        {"adversary": "lora"},
        "attackers train adapters, all in one forward; the base has no gradient",
    ),
    Lever("node_adversary", {"adversary": "resident"}, "one such attacker in each node, on a bf16 base divided in it"),
    Lever("persistent_adversary", {"persistent": True}, "attackers are kept, and go a few steps further each time"),
)
EXACT = {lever.name: lever for lever in _EXACT}
DEVIATIONS = {lever.name: lever for lever in _DEVIATIONS}

MICRO = "micro_batches"
"""The exact lever that is a number (``Setting.micro``): it is chosen so that a step fits, unless it is given."""

NOT_BUILT = frozenset({"node_adversary"})
"""Those that are planned, and that no method of this package can run yet."""

NOT_TOGETHER = (frozenset({"lora_adversary", "persistent_adversary"}),)
"""Those that can be run, but not with each other."""


def built(name: str) -> str:
    """What a table adds to the name of a lever, or of several with ``+`` between them."""
    pulled = set(name.split("+"))
    return " (not built)" if NOT_BUILT & pulled or any(apart <= pulled for apart in NOT_TOGETHER) else ""


def exact(s: Setting, without: frozenset[str] = frozenset()) -> Setting:
    """The job with all exact levers but these. Raises ValueError for one that there is not."""
    for name in sorted(without - EXACT.keys()):
        raise ValueError(f"without: expected some of {', '.join(EXACT)}, got {name!r}")
    for name, lever in EXACT.items():
        s = s if name in without else lever.pulled(s)
    return s


def deviation(s: Setting, names: str) -> Setting:
    """The job with a deviation, or with several (``a+b``). Raises ValueError for one that there is not, or for two that
    exclude each other.
    """
    changed: dict[str, Any] = {}
    for name in names.split("+"):
        if name not in DEVIATIONS:
            raise ValueError(f"deviation: expected some of {', '.join(DEVIATIONS)}, got {name!r}")
        if changed.keys() & DEVIATIONS[name].changes.keys():
            raise ValueError(f"deviation: expected some that go together, got {names!r}")
        changed |= DEVIATIONS[name].changes
    return dataclasses.replace(s, **changed)
