"""Ablation of refusal directions (Arditi et al. 2024, arXiv 2406.11717), again and again, as evaluation of a defense.

The attacker has the weights. He estimates the difference in means between harmful and harmless instructions on the
model that he attacks, chooses among its layers and positions as published, and runs the model without that direction.
Where it still refuses he estimates anew under the ablation, and takes one more direction out: a defense that is only
measured with one direction may have moved refusal to another. No weight is changed, and none need be: cutting the same
directions out of the weights gives the same model (``fastguard.edits.ablate``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastguard.attacks.refusal_ablation.options import Options
from fastguard.data.chat import IGNORED
from fastguard.directions.found import Directions
from fastguard.directions.select import Selection, select_anyway
from fastguard.directions.several import phases
from fastguard.directions.stream import Stream
from fastguard.methods.edit import Batches, Edit
from fastguard.methods.passes import Batch
from fastguard.methods.training import Figures, Role


class RefusalAblation(Edit):
    """One more refusal direction out of the stream each round.

    Args:
        model: any Hugging Face causal language model, found by structure. It runs ablated until `close`.
        rounds: directions at most. positions: how many last tokens of a prompt are candidates.
        validation: prompts of each class that choose among the candidates.
        estimation: how many of the others estimate them, at most.
        max_kl, min_steering: the published filters (`fastguard.directions.select`). Where no candidate passes them the
            attacker takes one all the same (`select_anyway`).
        seed: unused; nothing is drawn.

    Attributes:
        chosen: what was chosen in each round.

    Raises ValueError for a model whose structure is not recognised.
    """

    roles: ClassVar[dict[str, Role]] = {  # type: ignore[misc]
        "harmful": Role("attack"),
        "harmless": Role("instructions"),
        "refusal": Role("refusal"),
    }

    def __init__(
        self, model: nn.Module, *, rounds: int = Options.rounds, positions: int = Options.positions,
        validation: int = Options.validation, estimation: int = Options.estimation, max_kl: float = Options.max_kl,
        min_steering: float = Options.min_steering, seed: int = 0,
    ) -> None:  # fmt: skip
        Options(rounds, positions, validation, estimation, max_kl, min_steering)
        super().__init__(model, seed=seed)
        self.rounds, self.positions = rounds, positions
        self.validation, self.estimation = validation, estimation
        self.max_kl, self.min_steering = max_kl, min_steering
        self.chosen: list[Selection] = []
        self._stream = Stream(model)

    def apply(self, data: Batches) -> Generator[Figures]:
        """One round a direction. Figures: ``layer``, ``position``, ``passed`` (the filters), ``refusal`` (the score).

        Raises ValueError where there are no more prompts than `validation` wants.
        """
        tokens = first_answer_tokens(data["refusal"])
        asked, told = {}, {}
        for name in ("harmful", "harmless"):
            asked[name], rest = _divided(data[name], self.validation)
            if sum(len(batch["input_ids"]) for batch in asked[name]) < self.validation or not rest:
                given = sum(len(batch["input_ids"]) for batch in data[name])
                raise ValueError(f"{name}: expected more than {self.validation} prompts (validation), got {given}")
            told[name], _ = _divided(rest, self.estimation)
        basis: Tensor | None = None
        passed = False

        def choose(found: Directions) -> Tensor:
            nonlocal passed
            with contextlib.nullcontext() if basis is None else self._stream.ablated(basis):
                selection, passed = select_anyway(
                    self.model, found, asked["harmful"], asked["harmless"], refusal_tokens=tokens, max_kl=self.max_kl,
                    min_steering=self.min_steering,
                )  # fmt: skip
            self.chosen.append(selection)
            return selection.direction

        for basis in phases(
            self.model, told["harmful"], told["harmless"], self.rounds, choose, positions=self.positions,
            stream=self._stream,
        ):  # fmt: skip
            last = self.chosen[-1]
            score = float(last.refusal[last.position, last.layer])  # its rows are the last positions
            with self._stream.ablated(basis):
                yield {
                    name: torch.tensor(float(value))
                    for name, value in (
                        ("layer", last.layer), ("position", last.position), ("passed", passed), ("score", score)
                    )
                }  # fmt: skip

    def close(self) -> None:
        """Let the model run as it is, and take the hooks off."""
        self._stream.close()


def first_answer_tokens(batches: Sequence[Batch]) -> list[int]:
    """The ids with which the answers of ``batches`` begin. Raises ValueError where there is none."""
    found: set[int] = set()
    for batch in batches:
        counts = batch["labels"] != IGNORED
        rows = counts.any(1).nonzero()[:, 0]
        found |= set(batch["labels"][rows, counts[rows].int().argmax(1)].tolist())
    if not found:
        raise ValueError("refusal: expected answers, got none")
    return sorted(found)


def _divided(batches: Sequence[Batch], count: int) -> tuple[list[Batch], list[Batch]]:
    """The first ``count`` prompts of the batches, and the others."""
    first, rest = list[Batch](), list[Batch]()
    left = count
    for batch in batches:
        here = min(left, len(batch["input_ids"]))
        left -= here
        parts = ({k: v[:here] for k, v in batch.items()}, {k: v[here:] for k, v in batch.items()})
        for part, into in zip(parts, (first, rest), strict=True):
            if len(part["input_ids"]):
                into.append(part)
    return first, rest
