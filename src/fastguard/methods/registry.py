"""The registry: the methods of this package, and those that other packages announce.

Another package adds one by an entry point of the group ``fastguard.methods`` that leads to an `Entry`:

    [project.entry-points."fastguard.methods"]
    my_defense = "my_package.my_defense:ENTRY"

It then has a configuration, ``fastguard immunize my_defense``, ``fastguard plan``, the trainers' mixin and the rest.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.resources
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from fastguard.methods.edit import Edit
    from fastguard.methods.training import Training
    from fastguard.plan.cost import Cost
    from fastguard.settings import Settings

GROUP = "fastguard.methods"

BUILTIN = (
    "fastguard.defenses.sft",
    "fastguard.defenses.repnoise",
    "fastguard.defenses.tar",
    "fastguard.defenses.random_mapping",
    "fastguard.defenses.booster",
    "fastguard.defenses.vaccine",
    "fastguard.defenses.t_vaccine",
    "fastguard.defenses.seam",
    "fastguard.defenses.crl",
    "fastguard.defenses.refat",
    "fastguard.defenses.circuit_breaker",
    "fastguard.defenses.sn_tune",
    "fastguard.defenses.rsn_tune",
    "fastguard.defenses.safety_freezing",
    "fastguard.defenses.antidote",
    "fastguard.attacks.harmful_finetuning",
    "fastguard.attacks.lora",
    "fastguard.attacks.refusal_ablation",
    "fastguard.attacks.delta_strip",
)
"""The packages of this distribution, each with an ``ENTRY``."""

KINDS = ("defense", "attack")

STAGES = ("before", "during", "after")
"""When a defense acts: before anybody fine-tunes the model, while somebody does, or on what came out of it."""

SECTIONS = {"before": "immunize", "during": "guard", "after": "repair"}
"""The section of a configuration that names the defenses of each stage."""


@dataclass(frozen=True)
class Entry:
    """One method. What it names is imported on use, so that listing methods needs no torch.

    Attributes:
        name: in configurations and on the command line, snake_case. title: for readers.
        kind: ``defense`` or ``attack``. paper: where it is published.
        summary: one line that says what it does.
        method: ``package.module:Class``, a ``methods.training.Training`` or a ``methods.edit.Edit``.
        options: ``package.module:Class``, a ``settings.Settings``; its defaults are the published ones.
        cost: ``package.module:NAME``, a ``plan.cost.Cost``; None: the planner does not know it.
        steps: of the published run, in which every batch that a step reads has ``batch`` sequences of ``tokens``
            tokens over all of its GPUs, and which goes ``epochs`` times through its samples. steps_source: where these
            are from, and which of them are assumed.
        package: of the entry, with a ``config.yaml`` where it has a configuration of its own.
        distribution: that brought it.
        edits: whether the class is an ``Edit``, which has rounds, and not a ``Training``, which has steps.
        stage: of a defense, one of `STAGES`. Those that act during fine-tuning or after it are edits: during it
            ``apply`` hooks the model, somebody else trains, and ``close`` takes the hooks off.
        alone: whether it needs the model in one process, unsharded; so do all that edit.
    """

    name: str
    title: str
    kind: str
    paper: str
    summary: str
    method: str
    options: str
    cost: str | None = None
    steps: int = 1000
    steps_source: str = "assumed"
    batch: int = 32
    tokens: int = 256
    epochs: float = 1.0
    package: str | None = None
    distribution: str = "fastguard"
    edits: bool = False
    stage: str = "before"
    alone: bool = False

    def load_method(self) -> type[Training | Edit]:
        """The class."""
        found: type[Training | Edit] = _load(self.method, self.name)
        return found

    def load_options(self) -> type[Settings]:
        """The class of its options."""
        found: type[Settings] = _load(self.options, self.name)
        return found

    def load_cost(self) -> Cost:
        """What a step of it costs. Raises ValueError where the planner does not know it."""
        if self.cost is None:
            raise ValueError(f"defense: {self.name} has no cost that could be planned")
        found: Cost = _load(self.cost, self.name)
        return found

    def build(self, model: nn.Module, options: Settings | None = None, *, seed: int = 0) -> Any:
        """The method on a model: before compilation, DDP and FSDP2. Raises TypeError for another method's options."""
        kind = self.load_options()
        if options is not None and not isinstance(options, kind):
            raise TypeError(f"options: expected {kind.__module__}.{kind.__name__}, got {options!r}")
        return self.load_method().from_options(model, options or kind(), seed=seed)

    def config_text(self) -> str | None:
        """The method's packaged configuration, YAML; None where it has none."""
        if self.package is None:
            return None
        file = importlib.resources.files(self.package) / "config.yaml"
        return file.read_text(encoding="utf-8") if file.is_file() else None


def entries(kind: str | None = None) -> dict[str, Entry]:
    """All methods of a kind by name: this package's in the order of `BUILTIN`, then those of other packages.

    Raises ValueError where two packages use one name, or where an entry point leads to something else.
    """
    return {name: e for name, e in _all().items() if kind is None or e.kind == kind}


def defenses(stage: str | None = None) -> dict[str, Entry]:
    """The defenses by name, of one of `STAGES` or of all."""
    return {name: e for name, e in entries("defense").items() if stage is None or e.stage == stage}


def attacks() -> dict[str, Entry]:
    """The attacks by name."""
    return entries("attack")


def find(name: str, kind: str | None = None, key: str = "method", stage: str | None = None) -> Entry:
    """The method of that name, and of that stage where one is asked for.

    Raises ValueError that names ``key``, what was given, with its stage where that is wrong, and what is known.
    """
    known = {n: e for n, e in entries(kind).items() if stage is None or e.stage == stage}
    if name in known:
        return known[name]
    of = "" if stage is None else f" (methods {stage} fine-tuning)"
    other = entries(kind).get(name)
    belongs = "" if other is None else f", a method {other.stage} fine-tuning, of section {SECTIONS[other.stage]!r}"
    raise ValueError(f"{key}: expected one of {', '.join(known) or 'none'}{of}, got {name!r}{belongs}")


@functools.cache
def _all() -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for package in BUILTIN:
        _add(found, importlib.import_module(package).ENTRY, package)
    for point in importlib.metadata.entry_points(group=GROUP):
        try:
            entry = point.load()
        except Exception as error:
            raise ValueError(f"{GROUP}: {point.name} = {point.value!r} cannot be loaded: {error!r}") from error
        _add(found, entry, f"{point.name} = {point.value!r}")
    return found


def _add(found: dict[str, Entry], entry: Any, where: str) -> None:
    if not isinstance(entry, Entry) or entry.kind not in KINDS:
        raise ValueError(f"{GROUP}: {where}: expected an Entry of kind {' or '.join(KINDS)}, got {entry!r}")
    if entry.stage not in STAGES or (entry.stage != STAGES[0] and not (entry.edits and entry.kind == "defense")):
        raise ValueError(
            f"{GROUP}: {where}: stage: expected {' or '.join(STAGES)}, and a defense that edits for the latter two; "
            f"got {entry.stage!r} of a{'n' if entry.kind == 'attack' else ''} {entry.kind}"
            f"{' that edits' if entry.edits else ' that trains'}"
        )
    if entry.name in found:
        raise ValueError(f"{GROUP}: {where}: the name {entry.name!r} is taken by {found[entry.name].method}")
    found[entry.name] = entry


def _load(target: str, name: str) -> Any:
    module, _, attribute = target.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except AttributeError as error:
        raise ValueError(f"{name}: expected {attribute!r} in {module}") from error
