"""Projection onto a linear probe as a loss: harmful states cross over to the harmless side, the others stay.

With w_l the unit normal of a probe of hidden state l that points to the harmful class, h a live and h0 a frozen state
of a token of the harmful batch H or the retain batch R, the loss is

    mean over l of  mean_H ((w_l.h - tau_l) / s_l)^2  +  retain_weight mean_R ((w_l.h - w_l.h0) / s_l)^2

    tau_l = mean_R w_l.h0, or w_l.h0 - target s_l of each token          s_l^2 = mean_R |h0|^2 / D

From the paper (Yang et al., "Ablation is not enough to emulate DPO", arXiv 2411.06424): preference optimisation lowers
the projection of the stream onto a probe of the behaviour, by small shares of many neurons (``directions.neurons``),
and it is that projection which measures what was gained. It has no such loss: to ask for the projection itself, the
squares, the targets, the retain term and the unit s_l, in which states would spread by 1 along a random direction in
every layer, are ours. Nothing across w_l is held: add a loss that holds the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fastguard.losses import guards
from fastguard.losses.referenced import Pair, ReferencedLoss, Statistic, checked_layers
from fastguard.nested.reference import Reference
from fastguard.ops.precision import accumulation_dtype
from fastguard.ranks import DataRanks
from fastguard.taps import Structure, find_structure
from fastguard.taps.structure import head_parameters


class ProbeProjectionLoss(ReferencedLoss):
    """Harmful states' projections onto a probe move to a target, retained ones stay; see the equation above.

        found = fastguard.directions.probe(model, ...)                       # directions [L + 1, D]
        loss_fn = fastguard.losses.ProbeProjectionLoss(model, directions=found.directions, layers=(10, 20))
        loss = loss_fn(harmful=..., retain=..., model=wrapped)

    It is called, resumed and wrapped as ``CircuitBreakerLoss`` is, and keeps no counter; frozen states are kept as one
    number a token and layer. Under DDP and FSDP2 tau_l and s_l are a rank's own.

    Args:
        model: a Hugging Face causal language model, also PEFT, compiled or wrapped.
        directions: towards the harmful class, of any length but zero: [L + 1, D] (or [L, D]) as ``directions.probe``
            gives them, one for each layer's input; [len(layers), D]; or [D], the same at all ``layers``.
        layers: indices of the inputs of the layers, 0 to L - 1; None: all but 0, the embedding.
        target: None: the mean of the frozen harmless projections. A number: each token's own frozen projection less so
            many units s_l.
        retain_weight: of the second term.
        positions: ``attended``: the tokens that the attention mask keeps; ``labels``: those with ``labels`` other than
            -100, the answers.
        reference: the model as it was; None: as it is now.
        structure: what ``find_structure`` found for the model, if the caller has it already.
        check_finite: False leaves that to a caller who asks all ranks at once (see `check_components`).

    Attributes:
        components: of the last call with gradients, detached: ``loss``, ``harmful`` and ``retain`` (before its weight),
            ``shift``, how far harmful projections have gone from where they were, in units, and all three by layer
            as ``harmful_per_layer``, ``retain_per_layer``, ``shift_per_layer``.
        evaluation: the same of the last call without gradients.

    Raises:
        ValueError: directions or layers that do not fit the model, or an option that is out of range.
    """

    def __init__(
        self, model: nn.Module, *, directions: Tensor, layers: Sequence[int] | None = None,
        target: float | None = None, retain_weight: float = 1.0, positions: str = "labels",
        reference: Reference | None = None, structure: Structure | None = None, check_finite: bool = True,
    ) -> None:  # fmt: skip
        guards.not_negative(retain_weight=retain_weight)
        if target is not None and (isinstance(target, bool) or not math.isfinite(target)):
            raise ValueError(f"target: expected a finite number or None, got {target!r}")
        structure = find_structure(model) if structure is None else structure
        count = len(structure.layers)
        chosen = tuple(range(1, count)) if layers is None else checked_layers(layers, count - 1)
        if not chosen:
            raise ValueError("layers: expected a model of more than one layer where layers is None, got one of 1")
        rows = _rows(directions, chosen, count, head_parameters(structure.head)[0].shape[1])
        super().__init__(
            model, positions=positions, reference=reference, structure=structure, check_finite=check_finite
        )
        self.layers, self.target, self.retain_weight = chosen, target, retain_weight
        self.depth = max(max(chosen), 1)
        self._directions = dict(zip(chosen, rows, strict=True))

    def _project(self, index: int, x: Tensor) -> Tensor:
        """w.h of every token of x [..., D], flat, in fp32 (float64 for float64): products of bf16 would be rounded."""
        wide = accumulation_dtype(x.dtype)
        return x.flatten(0, -2).to(wide) @ self._directions[index].to(x.device, wide)

    def _frozen(self, pair: Pair) -> Statistic:
        """w.h0 of every token of both batches, and s."""

        def take(index: int, x: Tensor, keep: bool) -> Tensor:
            if index not in self.layers:
                return x.new_zeros(0)
            wide = accumulation_dtype(x.dtype)
            squares = torch.linalg.vector_norm(x[pair.split :].flatten(0, 1), dim=-1, dtype=wide).square() / x.shape[-1]
            unit = _mean(squares, pair.good).sqrt()
            return torch.cat([self._project(index, x), unit[None]])

        return take

    def _live(self, pair: Pair, frozen: Sequence[Tensor]) -> Statistic:
        """Both terms of a state, and how far its harmful projections have gone."""
        split = len(pair.bad)

        def statistic(index: int, x: Tensor, keep: bool) -> Tensor:
            if index not in self.layers:
                return x.new_zeros(0)
            bad_before, good_before, unit = frozen[index][:split], frozen[index][split:-1], frozen[index][-1]
            both = self._project(index, x)
            bad, good = both[:split], both[split:]
            target = _mean(good_before, pair.good) if self.target is None else bad_before - self.target * unit
            return torch.stack([
                _mean(((bad - target) / unit).square(), pair.bad),
                _mean(((good - good_before) / unit).square(), pair.good),
                _mean((bad - bad_before).detach() / unit, pair.bad),
            ])  # fmt: skip

        return statistic

    def _combine(
        self, pair: Pair, numbers: Sequence[Tensor], zero: Tensor, ranks: DataRanks | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        by_layer = torch.stack([numbers[i] for i in self.layers])
        parts: dict[str, Tensor] = {}
        for i, name in enumerate(("harmful", "retain", "shift")):
            parts[name], parts[f"{name}_per_layer"] = by_layer[:, i].mean(), by_layer[:, i]
        loss = parts["harmful"] + self.retain_weight * parts["retain"]
        parts["loss"] = loss + zero.to(loss.dtype)
        return parts, parts["loss"]

    def _named(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            f"{name} projection of hidden state {i} (of 0 to {self.last})": value
            for name in ("harmful", "retain")
            for i, value in zip(self.layers, parts[f"{name}_per_layer"], strict=True)
        }


def _mean(values: Tensor, rows: Tensor) -> Tensor:
    return torch.where(rows, values, 0).sum() / rows.sum()


def _rows(directions: Tensor, layers: tuple[int, ...], count: int, width: int) -> Tensor:
    """The unit directions [len(layers), D] of the layers, float64; raises ValueError."""
    ways = f"[{width}], [{len(layers)}, {width}], [{count}, {width}] or [{count + 1}, {width}]"
    if not isinstance(directions, Tensor) or not directions.is_floating_point():
        raise ValueError(f"directions: expected a floating tensor {ways}, got {type(directions).__name__}")
    rows = directions.detach().double()
    if rows.shape == (width,):
        rows = rows.expand(len(layers), width)
    elif rows.shape in ((count, width), (count + 1, width)):
        rows = rows[list(layers)]
    elif rows.shape != (len(layers), width):
        raise ValueError(f"directions: expected {ways}, got {tuple(directions.shape)}")
    lengths = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    if not bool(torch.isfinite(lengths).all()) or bool((lengths == 0).any()):
        raise ValueError("directions: expected finite rows other than zero, got one that is not")
    return rows / lengths
