"""Refusal directions: differences between the stream's means over harmful and over harmless instructions."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fastguard import machine
from fastguard.directions.found import Directions
from fastguard.directions.moments import Moments
from fastguard.directions.prompts import Batch, in_step, reading, rows_at, sharded, wanted
from fastguard.taps import Structure, find_structure

HARMFUL, HARMLESS = 0, 1


def estimate(
    model: nn.Module,
    harmful: Iterable[Batch],
    harmless: Iterable[Batch],
    *,
    positions: int | Iterable[int] = 5,
    last_output: bool = False,
    second: bool = False,
    model_hash: str = "",
    data_hash: str = "",
    structure: Structure | None = None,
) -> Directions:
    """Difference in means (Arditi et al. 2024, arXiv 2406.11717) at every layer's input and position, in one pass.

    One forward a batch in evaluation mode without gradients, which ends before the last layer (it is the last *input*
    that is wanted) and has no head; a sharded model's forward is a whole one. Nothing is kept but sums in fp32 with
    compensation. In a job of several ranks each gives its share of the prompts, and all get the same result.

    Args:
        model: any Hugging Face causal language model, found by structure; PEFT, DDP, FSDP2, compiled.
        harmful, harmless: batches of instructions in the chat format up to where the answer begins: ``input_ids``
            [B, T] and, where there is padding on either side, ``attention_mask``.
        positions: how many tokens from the end (those behind the instruction, in the paper), or which, as negative
            numbers.
        last_output: the last layer's output too, as layer L; the paper has it not.
        second: means of squares too.
        model_hash, data_hash: what to note as the origin (``fastguard.models.model_digest``; a digest of the prompts).
        structure: of ``find_structure``, where it is known already.

    Returns:
        `Directions` on the CPU in fp32, float64 for float64 models.

    Raises:
        ValueError: batches that do not fit, prompts shorter than the positions, a class without a prompt.
        FloatingPointError: means that are not finite.
    """
    chosen = wanted(positions)
    structure = find_structure(model) if structure is None else structure
    layers = len(structure.layers) + last_output
    moments = Moments(2, layers, second)
    device = next(structure.model.parameters()).device
    together = sharded(model) and machine.ranks() > 1
    with reading(model, structure) as prompts:
        for kind, name, batches in ((HARMFUL, "harmful", harmful), (HARMLESS, "harmless", harmless)):
            for batch, counts in in_step(batches, together, device, name):
                at = rows_at(batch, chosen if counts else (-1,), name)

                def look(layer: int, rows: Tensor, kind: int = kind, counts: bool = counts) -> None:
                    if counts:
                        moments.add(kind, layer, rows)

                prompts.read(batch, at, look, layers - 1)
    if machine.ranks() > 1:
        moments.reduce(device)
    for kind, name in ((HARMFUL, "harmful"), (HARMLESS, "harmless")):
        if not moments.counts[kind]:
            raise ValueError(f"{name}: expected at least one prompt, got none")
    found = Directions(
        moments.mean(HARMFUL),
        moments.mean(HARMLESS),
        (moments.counts[HARMFUL], moments.counts[HARMLESS]),
        chosen,
        moments.mean(HARMFUL, 2) if second else None,
        moments.mean(HARMLESS, 2) if second else None,
        model_hash,
        data_hash,
    )
    if not torch.isfinite(found.difference).all():
        layer = int((~torch.isfinite(found.difference)).any(-1).any(0).nonzero()[0])
        raise FloatingPointError(f"directions: the means at layer {layer} are not finite")
    return found
