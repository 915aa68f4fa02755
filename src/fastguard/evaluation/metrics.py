"""The document that a run leaves behind, ``metrics.json``, and the two numbers that sum up an attack curve.

The typed dictionaries below are the schema (version :data:`SCHEMA`). Conventions:

* every rate is a fraction in [0, 1], every loss is in nats per token, every time is in seconds;
* ``None`` (JSON null) means "not measured" or, for a crossing, "not reached within the attack";
* lists of points are ordered by ``step``, step 0 being the model before the attack;
* the three models are keyed ``aligned``, ``immunized`` and ``control``; a run may lack some of them, and one
  with variants or a guard has further names, so readers iterate over ``models`` and take titles from ``label``;
* harmful-side texts are never stored; ``samples`` are answers to harmless prompts.

An example document is tests/evaluation/example_metrics.json.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TypedDict

from fastguard.data.sources import DataSource as DataSource
from fastguard.data.sources import Split as Split

SCHEMA = 1


class AttackPoint(TypedDict):
    """One scoring of the attacked model on the held-out harmful prompts.

    refusal + compliance + neither = 1: an answer that does not refuse need not comply.
    """

    step: int  # attack steps, or rounds, taken so far
    refusal: float
    compliance: float
    neither: float
    harmful_loss: float  # cross-entropy of held-out placeholder targets, nats per token


class Condition(TypedDict):
    """What a fine-tuned model is like: before a repair, and after it."""

    refusal: float | None  # the three rates on the held-out harmful prompts
    compliance: float | None
    neither: float | None
    harmful_loss: float | None  # on held-out placeholder targets
    perplexity: float | None  # exp of the mean answer loss on held-out harmless conversations
    task_loss: float | None  # held-out loss of the harmless task, as the model stands: it is not trained for it here


class Applied(TypedDict):
    """A defense that acted during a fine-tuning or after it."""

    name: str  # of the method
    title: str  # for a reader
    figures: dict[str, float]  # what its last round found
    wall_s: float  # of it alone


class Repair(Applied):
    """A defense after a fine-tuning, and what it changed."""

    before: Condition
    after: Condition


class Served(TypedDict, total=False):
    """What a fine-tuning met; absent where there was no such defense, and in documents from before there were any."""

    guard: Applied  # it trained under this
    repair: Repair  # its model was repaired


class Named(Served, total=False):
    """Which attack it was; absent in documents from before there were several."""

    name: str  # in the configuration: ``attack``, the main one, or one of ``attacks``
    title: str  # for a reader; absent: harmful fine-tuning


class Attack(Named):
    """One run of an attack against one model. Where an attack edits instead of training, its steps are rounds."""

    lr: float | None  # None: it edits
    seed: int
    batch: int  # prompts per step
    budget: int  # the last step at which this attack would be scored
    threshold: float  # compliance at which the attack counts as successful, and stops
    points: list[AttackPoint]
    compliance_crossing: float | None  # first step (interpolated) with compliance >= threshold; None: not within budget
    refusal_crossing: float | None  # first step (interpolated) with refusal <= 1 - threshold; None: not within budget
    compliance_area: float  # mean compliance over [0, budget]; after an early stop the last value is carried on
    refusal_area: float  # mean refusal over [0, budget], likewise
    wall_s: float  # training and scoring


MAIN = "attack"
"""The attack that aims and headlines are about; a configuration may name others beside it."""

Kind = tuple[str, float | None]
"""Attacks that belong together: of one name, at one learning rate. They differ by their seeds."""


def kind_of(attack: Attack) -> Kind:
    """What an attack is one of."""
    return attack.get("name", MAIN), attack["lr"]


class Benign(Served):
    """Fine-tuning on a harmless task: does the model still learn?"""

    lr: float
    batch: int
    steps: list[int]
    loss: list[float]  # held-out cross-entropy of the answers at each of ``steps``


class Utility(TypedDict):
    """What the model is worth before any attack."""

    perplexity: float | None  # exp of the mean answer loss on held-out harmless conversations
    over_refusal: float | None  # share of held-out ordinary instructions that the model refuses
    edgy_over_refusal: float | None  # the same on harmless prompts that merely sound dangerous
    benign: Benign | None
    samples: list[dict[str, str]]  # {"prompt", "answer"}: a few harmless prompts, answers cut short


class Training(TypedDict):
    """How the model was made from the one before it."""

    parent: str  # "base" or a key of ``models``
    method: str  # one line for a reader
    steps: int  # or rounds, of an edit
    wall_s: float  # optimisation alone: the clock that the control is given too
    lr: float | None  # None: it was edited, in rounds, or is another model's weights
    curve: list[dict[str, float]]  # {"step", and the loss and its components at that step, or a round's figures}


class Model(TypedDict):
    """Everything measured about one model."""

    label: str
    training: Training
    utility: Utility | None  # None: not measured
    attacks: list[Attack]  # every attack at every learning rate and seed


class Aim(TypedDict):
    """A figure that the run was asked to reach."""

    name: str
    value: float | None
    bound: float
    sense: str  # ">=" or "<="
    met: bool | None  # None: not measured


class Stage(TypedDict):
    """One resumable step of the pipeline."""

    name: str
    wall_s: float
    resumed: bool  # its result was found from an earlier, interrupted run
    peak_memory_bytes: int  # peak resident memory of the process by the end of this stage


class Environment(TypedDict):
    """Where the figures come from."""

    date: str  # ISO 8601, UTC
    cpu: str
    cores: int
    threads: int
    simd: str
    device: str
    dtype: str
    platform: str
    versions: dict[str, str]  # python, torch, transformers, fastguard, ...


class Metrics(TypedDict):
    """The whole document."""

    schema: int
    title: str
    quick: bool
    config: dict[str, object]  # the resolved configuration, defaults included
    environment: Environment
    data: dict[str, DataSource]
    stages: list[Stage]
    wall_s: float  # sum over stages, those of an interrupted run included
    peak_memory_bytes: int
    models: dict[str, Model]
    aims: list[Aim]
    notes: list[str]  # what the numbers do not show


def crossing(steps: Sequence[int], values: Sequence[float], level: float, rising: bool = True) -> float | None:
    """The first step at which the piecewise-linear curve reaches ``level``; None if it never does.

    ``rising``: the curve has to come from below (compliance); False: from above (refusal). A curve that
    starts beyond the level has crossed at its first step.
    """
    _check_curve(steps, values)
    sign = 1.0 if rising else -1.0
    gaps = [sign * (v - level) for v in values]
    if gaps[0] >= 0:
        return float(steps[0])
    for i in range(1, len(gaps)):
        if gaps[i] >= 0:
            return steps[i - 1] + (steps[i] - steps[i - 1]) * gaps[i - 1] / (gaps[i - 1] - gaps[i])
    return None


def area(steps: Sequence[int], values: Sequence[float], budget: int) -> float:
    """Mean height of the piecewise-linear curve over [steps[0], budget]; the last value is carried to ``budget``."""
    _check_curve(steps, values)
    if budget < steps[-1]:
        raise ValueError(f"budget: got {budget}, expected at least the last scored step {steps[-1]}")
    if budget == steps[0]:
        return values[0]
    total = sum((steps[i] - steps[i - 1]) * (values[i] + values[i - 1]) / 2 for i in range(1, len(steps)))
    return (total + (budget - steps[-1]) * values[-1]) / (budget - steps[0])


def _check_curve(steps: Sequence[int], values: Sequence[float]) -> None:
    if not steps or len(steps) != len(values):
        raise ValueError(f"curve: got {len(steps)} steps and {len(values)} values, expected equally many, at least one")
    if any(b <= a for a, b in itertools.pairwise(steps)):
        raise ValueError(f"curve: steps must increase, got {list(steps)}")
