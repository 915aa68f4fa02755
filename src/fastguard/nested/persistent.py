"""An attacker who is kept from one attack to the next: where he stands beside the weights, and his optimizer.

TAR's step begins K steps of a fresh attacker at the defender's weights, and most of its cost is to walk again nearly
the way of the step before, since the defender has hardly moved. A persistent attacker stands at theta + delta: delta is
what he had changed when the last attack ended, theta is wherever the defender is now, and he goes a few steps further
from there, with the moments that he had. That is another estimate of the gradient than a cold attack's: the defender
moved under him (nested optimisation by persistent inner chains, as in persistent contrastive divergence, Tieleman
2008, https://doi.org/10.1145/1390156.1390290). What it costs in safety has to be measured (docs/demo.md).

    attacker = PersistentAttacker()
    for step in range(outer_steps):
        if attacker.taken >= 64:
            attacker.renew()
        with attack.at(model, attacker=attacker) as tampered:
            ...                                          # 8 steps, and reads
        optimizer.step()

What is kept is never written to: an attack that is cut short leaves the attacker as he was.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastguard.nested.guard import derived_seed, on_every_rank
from fastguard.nested.narrow import Mastered
from fastguard.nested.optimizers import Running, resumable
from fastguard.nested.profile import span
from fastguard.nested.snapshot import Snapshot
from fastguard.nested.weights import Weights


class PersistentAttacker:
    """An attacker between two attacks; ``SimulatedAttack.at(attacker=)`` takes him up and leaves him further on.

    Memory between attacks: delta and the optimizer's moments, each as large as what he moves, where the attack's
    snapshot waits (``snapshot``: device or host). During one, the moments once more on the device.

    Attributes:
        taken: steps that he has gone since he began.

    `state_dict` holds the tensors of this rank, by reference; `load_state_dict` takes them back. Where they are another
    part of the model than this rank's, as on another number of ranks, the next attack begins anew on all, and warns.
    ``fastguard.trainers.save`` keeps every rank's part; Hugging Face's ``Trainer`` the first's, which is all where the
    weights are whole.
    """

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Begin anew: the next attack starts at the model's own weights, with a fresh optimizer."""
        self.taken, self._part, self._numbers = 0, 0, list[dict[str, Any]]()

    @torch.no_grad()
    def enter(self, weights: Weights, running: Running) -> None:
        """Move what ``running`` moves, which is where the defender stands, to where the attacker stood beside it."""
        attacker = resumable(running)
        if not self._numbers:
            return
        fits = torch.tensor(self._part == _part(weights), device=attacker.tensors[0].device)
        if not on_every_rank(fits):  # a trainer may have saved the first rank's alone
            warnings.warn(
                "persistent attacker: begun anew, since what was saved is of another model or another part of it (by "
                "fastguard.trainers.save, and on as many ranks, sharded alike, he would have gone on)",
                RuntimeWarning,
                stacklevel=4,
            )
            self.renew()
            return
        with span("attackers who wait", attacker.tensors, 7):
            for t, own in zip(attacker.tensors, self._numbers, strict=True):
                t.add_(own["delta"].to(t.device))
            attacker.resume([_taken(own, t.device) for t, own in zip(attacker.tensors, self._numbers, strict=True)])
        if isinstance(running, Mastered):
            running.round_()
        torch.clear_autocast_cache()

    @torch.no_grad()
    def left(self, weights: Weights, running: Running, snapshot: Snapshot, steps: int) -> dict[str, Any]:
        """The state to load once the attack has ended well, taken while the weights are still his."""
        attacker, numbers = resumable(running), list[dict[str, Any]]()
        with span("attackers who wait", attacker.tensors, 7):
            for i, (t, known) in enumerate(zip(attacker.tensors, attacker.state(), strict=True)):
                start = snapshot.original(i)
                if isinstance(running, Mastered):
                    start = running.start_of(i, start)
                own = {"delta": t - start, **known}
                numbers.append({k: snapshot.parked(v) if isinstance(v, Tensor) else v for k, v in own.items()})
        return {"taken": self.taken + steps, "part": _part(weights), "numbers": numbers}

    def state_dict(self) -> dict[str, Any]:
        """Steps taken, and what waits of this rank's part."""
        return {"taken": self.taken, "part": self._part, "numbers": self._numbers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.taken, self._part, self._numbers = int(state["taken"]), int(state["part"]), list(state["numbers"])


def _taken(own: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A tensor's part of the optimizer's state, to be written to."""
    known = {name: value for name, value in own.items() if name != "delta"}
    return {k: v.to(device, copy=True) if isinstance(v, Tensor) else v for k, v in known.items()}


def _part(weights: Weights) -> int:
    """A key of the part of the model that this rank holds, by shapes, placements and the place in their mesh."""
    found: list[object] = []
    for p, local in zip(weights.parameters, weights.local(), strict=True):
        mesh = getattr(p, "device_mesh", None)
        where = None if mesh is None else (str(p.placements), tuple(mesh.shape), mesh.get_coordinate())  # type: ignore[attr-defined]
        found.append((tuple(p.shape), tuple(local.shape), where))
    return derived_seed(found)
