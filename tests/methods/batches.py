"""Batches for any method of the registry, by role, out of random pairs; settings for a tiny model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fastguard.methods import Entry
from fastguard.methods.training import Role, Training
from fastguard.settings import build
from tiny_models import pair


def labelled(n: int, half: int) -> dict[str, Any]:
    """A batch whose answers carry loss: half 0 is harmful, 1 the same prompts answered harmlessly."""
    batch = pair(seed=n)[half]
    answer = torch.arange(batch["input_ids"].shape[1]) >= 3  # what `pair` begins with is the prompt
    return {**batch, "labels": batch["input_ids"].where(answer, -100)}


def streams(
    roles: Mapping[str, Role], batch: Callable[[int, int], dict[str, Any]] = labelled
) -> dict[str, Callable[[int], Any]]:
    """A method's batches by number, made by ``batch`` as `labelled` makes them."""

    def part(half: int, shift: int) -> Callable[[int], Any]:
        return lambda n: batch(n + shift, half)

    parts: dict[str, Callable[[int], Any]] = {
        "pair": lambda n: {"harmful": batch(n, 0), "harmless": batch(n, 1)},
        "preference": lambda n: {"chosen": batch(n, 1), "rejected": batch(n, 0)},
        **{name: part(0, 100 * i) for i, name in enumerate(("harmful", "attack", "attacker", "held_out"))},
        **{name: part(1, 100 * i) for i, name in enumerate(("refusal", "safe", "retain", "benign"))},
    }
    return {name: parts[role.data] for name, role in roles.items()}


def evidence(roles: Mapping[str, Role], padded: bool = True) -> dict[str, list[dict[str, Any]]]:
    """All that an edit reads: two batches of each role."""
    found = {}
    for i, (name, role) in enumerate(roles.items()):
        half = 0 if role.data == "harmful" else 1
        found[name] = [labelled(10 * i + n, half) for n in range(2)]
        for batch in found[name] if padded else ():
            batch["attention_mask"] = batch["attention_mask"].clone()
            batch["attention_mask"][0, -2:] = 0
            batch["labels"][0, -2:] = -100
    return found


def make(entry: Entry, model: nn.Module, **changes: Any) -> Training:
    """The method with the settings of a test machine."""
    options = entry.load_options()
    return entry.build(model, build(options, {**options.quick, **changes}), seed=3)
