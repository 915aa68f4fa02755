"""How well one direction a layer tells harmful instructions from harmless ones, on prompts that it has not seen."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastguard import machine
from fastguard.directions.estimate import estimate
from fastguard.directions.found import Directions
from fastguard.directions.prompts import Batch, in_step, reading, rows_at, sharded, wanted
from fastguard.taps import Structure, find_structure

STEPS = 25
KINDS = ("means", "logistic")


@dataclass(frozen=True)
class Probe:
    """One linear probe a layer, for the inputs of all L layers and the last output.

    Attributes:
        auc: [L + 1] area under the curve on held-out prompts, float64.
        directions: [L + 1, D] of length 1, pointing to the harmful class.
        position: counted from the prompt's end.
    """

    auc: Tensor
    directions: Tensor
    position: int


def auc(positive: Tensor, negative: Tensor) -> Tensor:
    """The share of pairs in which the positive score is the greater, ties a half: [N, ...] and [M, ...] to [...]."""
    if not len(positive) or not len(negative) or positive.shape[1:] != negative.shape[1:]:
        raise ValueError(
            f"positive, negative: expected scores [N, ...] and [M, ...], got {tuple(positive.shape)} and "
            f"{tuple(negative.shape)}"
        )
    p = positive.reshape(len(positive), -1).T.double().contiguous()
    n = negative.reshape(len(negative), -1).T.double().sort(-1).values.contiguous()
    below, up_to = torch.searchsorted(n, p), torch.searchsorted(n, p, right=True)
    return ((below + up_to).double().mean(-1) / (2 * len(negative))).reshape(positive.shape[1:])


def probe(
    model: nn.Module,
    harmful: Iterable[Batch],
    harmless: Iterable[Batch],
    held_out_harmful: Iterable[Batch],
    held_out_harmless: Iterable[Batch],
    *,
    position: int = -1,
    kind: str = "means",
    ridge: float = 1e-2,
    structure: Structure | None = None,
) -> Probe:
    """Probes at one position, learned on two sets of prompts and measured on two others, one forward a batch.

    Args:
        model: as `estimate` takes it.
        harmful, harmless, held_out_harmful, held_out_harmless: batches as `estimate` takes them.
        position: counted from the prompt's end.
        kind: ``means``: the difference of the classes' means, streamed, nothing kept. ``logistic``: logistic regression
            with a ridge penalty on centred rows; the learned-from rows [N, L + 1, D] are kept on the CPU.
        ridge: of the logistic regression, relative to the rows' mean square length.

    Raises:
        ValueError: batches or options that do not fit.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    if not ridge > 0:
        raise ValueError(f"ridge: expected a positive number, got {ridge!r}")
    structure = find_structure(model) if structure is None else structure
    chosen = wanted((position,))
    if kind == "means":
        found = estimate(model, harmful, harmless, positions=chosen, last_output=True, structure=structure)
        rows = found.difference[0]
    else:
        learned = [_rows(model, structure, b, chosen, n) for n, b in (("harmful", harmful), ("harmless", harmless))]
        rows = torch.stack([_logistic(a, b, ridge) for a, b in zip(*(each.unbind(1) for each in learned), strict=True)])
    lengths = torch.linalg.vector_norm(rows.double(), dim=-1, keepdim=True)
    directions = (rows.double() / lengths.clamp_min(1e-300)).to(rows.dtype)
    scores = [
        _rows(model, structure, batches, chosen, name, directions[None])
        for name, batches in (("held_out_harmful", held_out_harmful), ("held_out_harmless", held_out_harmless))
    ]
    return Probe(auc(*scores)[:, 0], directions, position)


def separation(
    model: nn.Module,
    directions: Directions,
    held_out_harmful: Iterable[Batch],
    held_out_harmless: Iterable[Batch],
    *,
    structure: Structure | None = None,
) -> Tensor:
    """How well each difference of means tells the classes apart: area under the curve [P, L], float64.

    What `probe` measures for ``kind="means"``, of what `estimate` found already, at all of its positions in one pass
    over the held-out prompts.

    Raises ValueError for batches, or directions of another model's shape.
    """
    structure = find_structure(model) if structure is None else structure
    rows = directions.difference
    if rows.shape[1] not in (len(structure.layers), len(structure.layers) + 1):
        raise ValueError(f"directions: expected those of {len(structure.layers)} layers, got {rows.shape[1]}")
    scores = [
        _rows(model, structure, batches, directions.positions, name, rows)
        for name, batches in (("held_out_harmful", held_out_harmful), ("held_out_harmless", held_out_harmless))
    ]
    return auc(*scores).T


def _rows(
    model: nn.Module,
    structure: Structure,
    batches: Iterable[Batch],
    positions: tuple[int, ...],
    name: str,
    directions: Tensor | None = None,
) -> Tensor:
    """Rows [N, L + 1, D] at one position, of all ranks' prompts, on the CPU.

    Where ``directions`` [P, layers, D] are given, their products with the rows at each position: [N, layers, P].
    """
    count = len(structure.layers) + 1 if directions is None else directions.shape[1]
    kept: list[list[Tensor]] = [[] for _ in range(count)]
    device = next(structure.model.parameters()).device

    def look(layer: int, rows: Tensor) -> None:
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        row = wide[:, 0] if directions is None else torch.einsum("bpd,pd->bp", wide, directions[:, layer].to(wide))
        kept[layer].append(row.cpu())

    with reading(model, structure) as prompts:
        for batch, counts in in_step(batches, sharded(model) and machine.ranks() > 1, device, name):
            at = rows_at(batch, positions if counts else (-1,), name)
            prompts.read(batch, at, look if counts else lambda layer, rows: None, count - 1)
    mine = torch.stack([torch.cat(each) for each in kept], 1) if kept[0] else torch.zeros(0)
    if machine.ranks() > 1:
        theirs: list[Tensor] = [mine] * machine.ranks()
        torch.distributed.all_gather_object(theirs, mine)
        some = [each for each in theirs if len(each)]
        mine = torch.cat(some) if some else mine
    if not len(mine):
        raise ValueError(f"{name}: expected at least one prompt, got none")
    return mine


def _logistic(harmful: Tensor, harmless: Tensor, ridge: float) -> Tensor:
    """The normal [D] of a ridge logistic regression between rows [N, D] and [M, D], by Newton steps in the dual."""
    x = torch.cat([harmful, harmless]).double()
    x = x - x.mean(0)
    gram = x @ x.T
    scale = gram.diagonal().mean().clamp_min(1e-300)
    gram = gram / scale
    target = torch.cat([x.new_ones(len(harmful)), x.new_zeros(len(harmless))])
    penalty, dual, offset = ridge * len(x), torch.zeros_like(target), x.new_zeros(())
    ones = torch.ones_like(target)
    for _ in range(STEPS):
        score = gram @ dual + offset
        p = torch.sigmoid(score)
        weight = (p * (1 - p)).clamp_min(1e-6)
        solved = torch.linalg.solve(
            gram + torch.diag(penalty / weight), torch.stack([score + (target - p) / weight, ones], 1)
        )
        offset = solved[:, 0].sum() / solved[:, 1].sum()  # so that the dual sums to 0, as the offset's condition asks
        dual = solved[:, 0] - offset * solved[:, 1]
    return (x.T @ dual).to(harmful.dtype)
