"""Circuit breakers as a drop-in loss: representation rerouting (Zou et al. 2024, arXiv 2406.04313).

With h a live and h0 a frozen hidden state of one token, in call t of a training:

    alpha t / 300        mean |h - h0|               over states and tokens of the retain batch: stay as you were
    + alpha (1 - t / 300) mean relu(cos(h, h0))      over ``layers`` and tokens of the harmful batch: turn away

Published code keeps stacks of all hidden states of both models in fp32, and runs four forwards. Here the frozen states
come from one forward of ``nested.Reference`` (the initial weights change places with the live ones, or the adapters are
switched off) and only those that are read are kept, in the model's dtype; both batches run as one, in one live forward;
each state's distances are taken by a tap where it arises, and the layers above those that are read are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fastguard.losses import guards
from fastguard.losses.referenced import Pair, ReferencedLoss, Statistic, checked_layers
from fastguard.nested.guard import derived_seed
from fastguard.nested.reference import Reference
from fastguard.ops.final_norm import portable as final_norm
from fastguard.ops.representation_distance import representation_distance
from fastguard.ops.vocabulary import Norm
from fastguard.over_ranks import totals
from fastguard.ranks import DataRanks
from fastguard.taps import Structure, anchor, find_structure

RETAIN_STATES = ("truncated", "all")
RETAIN_DISTANCES = ("absolute", "relative")

NUDGE = 2.0**-8
"""Radians; the spacing of bf16."""


class CircuitBreakerLoss(ReferencedLoss):
    """The loss of circuit breakers on a harmful and a retain batch.

        loss_fn = fastguard.CircuitBreakerLoss(model, layers=(10, 20))     # before compilation, DDP and FSDP2
        loss = loss_fn(harmful=..., retain=..., model=wrapped)
        loss.backward(); optimizer.step(); optimizer.zero_grad()

    The model is not a submodule: the loss has no parameters, its state_dict holds the counter of calls alone. It cannot
    be copied or pickled; its state_dict can. A run is resumed by constructing the loss on the model as it was before
    the defense, for that is the reference, and loading weights and ``state_dict`` after that.

    The counter t of the schedule is 1 in the first call with gradients and grows by 1 with each that returns a loss,
    as published: k micro-batches of one step are k calls, for which ``schedule`` is to be k times as long. A recomputed
    layer is no call; a call that raises does not count. A call without gradients (``torch.no_grad``) evaluates, at the
    coming call's weights of the two terms, and moves nothing.

    **The first step.** As long as a live state equals its frozen one, cos is at its maximum and the loss has no
    gradient at all: published code leaves that point by rounding errors, and where there are none (bf16) not at all.
    Here a row that equals its frozen one to the bit gets the gradient that it would have if it were turned by
    ``nudge`` radians in a direction drawn once for each layer. The loss's value does not change, and no row that has
    moved is touched.

    Deviations: for t > ``schedule`` (published runs end at half of it) the weights stay at alpha and 0, where the
    published retain weight grows on; a state that is zero has cos 0 instead of NaN; a NaN is an error instead of being
    left out of the mean.

    Args:
        model: a Hugging Face causal language model, also PEFT, compiled or wrapped.
        layers: indices into the L + 1 hidden states (0 is the first layer's input, L the final norm's output); None:
            the published 10 and 20 of 32, scaled to the model's depth.
        alpha: of both terms.
        schedule: calls in which the weight goes from rerouting to retaining. Published: 300, of which 150 are made.
        positions: ``attended`` (published): the tokens that the attention mask keeps, prompts too; ``labels``:
            those with ``labels`` other than -100, the answers.
        mask_padding: leave the other tokens out of the retain term's mean. The published code does not: they
            contribute 0 and are counted, so that the term weighs less the more padding there is.
        retain_states: ``truncated`` (published): those of a model that ends after the layer that state ``max(layers)``
            enters: states 0 to max(layers) and that layer's output through the final norm. ``all``: all L + 1 (the
            published ``full_layers``), for runs that train layers above that.
        retain_distance: ``absolute`` (published): |h - h0|, in which the tokens with massive activations, such as the
            first, count for all others; ``relative``: |h - h0| / |h0|, of the size of the cosine on every model.
        nudge: radians, see above; 0: none.
        seed: of the nudge's directions.
        reference: the model as it was; None: as it is now.
        structure: what ``find_structure`` found for the model, if the caller has it already.
        check_finite: False leaves that to a caller who asks all ranks at once (see `check_components`).
        over_ranks: whether means are over the samples of all data ranks, so that the engine's average of gradients is
            the gradient of the undivided batch; False: of this rank's, as the engine's own losses are. Calls without
            gradients are this rank's in any case.

    Attributes:
        components: of the last call with gradients, detached: ``loss``; ``retain`` and ``rerouting`` before their
            weights ``retain_weight`` and ``rerouting_weight``; by state ``retain_per_state`` and by layer
            ``rerouting_per_layer``. evaluation: the same of the last call without gradients.

    Raises:
        ValueError: the model has no findable head, final norm or layers, or an option is out of range.
    """

    call: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Sequence[int] | None = None,
        alpha: float = 10.0,
        schedule: int = 300,
        positions: str = "attended",
        mask_padding: bool = False,
        retain_states: str = "truncated",
        retain_distance: str = "absolute",
        nudge: float = NUDGE,
        seed: int = 0,
        reference: Reference | None = None,
        structure: Structure | None = None,
        check_finite: bool = True,
        over_ranks: bool = False,
    ) -> None:
        guards.not_negative(alpha=alpha, nudge=nudge)
        for name, number, least in (("schedule", schedule, 1), ("seed", seed, None)):
            if isinstance(number, bool) or not isinstance(number, int) or (least is not None and number < least):
                raise ValueError(f"{name}: expected an int{'' if least is None else f' >= {least}'}, got {number!r}")
        for name, value, choices in (
            ("retain_states", retain_states, RETAIN_STATES), ("retain_distance", retain_distance, RETAIN_DISTANCES),
        ):  # fmt: skip
            if value not in choices:
                raise ValueError(f"{name}: expected {' or '.join(choices)}, got {value!r}")
        structure = find_structure(model) if structure is None else structure
        last = len(structure.layers)
        chosen = default_layers(last) if layers is None else checked_layers(layers, last)
        super().__init__(
            model, positions=positions, reference=reference, structure=structure, check_finite=check_finite,
            over_ranks=over_ranks,
        )  # fmt: skip
        self.layers = chosen
        self.alpha, self.schedule, self.mask_padding = alpha, schedule, mask_padding
        self.retain_states, self.retain_distance = retain_states, retain_distance
        self.nudge, self.seed = nudge, seed
        # The output of the last layer that runs is state `depth`, before the final norm.
        self.depth = self.last if retain_states == "all" else min(max(self.layers) + 1, self.last)
        self.retained = tuple(range(self.depth + 1))
        self.register_buffer("call", torch.zeros((), dtype=torch.int64))

    def _has_trained(self) -> None:
        self.call += 1

    def _is_normed_here(self, index: int) -> bool:
        """Whether state ``index``, of the retain term alone, is read through the final norm by this loss itself."""
        return index == self.depth < self.last

    def _norm(self) -> Callable[[Tensor], Tensor]:
        """The final norm, for a state that the model does not give to it; made while parameters are sharded."""
        if self.structure.norm_kind is None:
            return self.structure.norm.forward
        parts = self.structure
        weight, bias = (anchor.anchored(parts.model, getattr(parts.norm, name, None)) for name in ("weight", "bias"))
        norm = Norm(self.structure.norm_kind, weight, bias, self.structure.norm_eps)
        return lambda x: final_norm.apply(x, norm)

    def _frozen(self, pair: Pair) -> Statistic:
        """Both batches' states at ``layers``, the retain batch's at the others."""
        norm = self._norm()

        def take(index: int, x: Tensor, keep: bool) -> Tensor:
            if index in self.layers:  # the normed one is no such state
                return x.detach()
            if index not in self.retained:
                return x.new_zeros(0)
            rows = x[pair.split :].detach()
            return norm(rows) if self._is_normed_here(index) else rows.clone()

        return take

    def _live(self, pair: Pair, frozen: Sequence[Tensor]) -> Statistic:
        """Of each state the sum of relu(cos) and the nudge, where it is rerouted; the sum of distances."""
        split, norm, directions = pair.split, self._norm(), self._directions(frozen)

        def statistic(index: int, x: Tensor, keep: bool) -> Tensor:
            sums = []
            if index in self.layers:
                live, before = (state[:split].flatten(0, 1) for state in (x, frozen[index]))
                apart = representation_distance(live[None], before[None], pair.bad, kind="cosine")[0]
                sums.append(torch.where(pair.bad, torch.relu(1 - apart), 0).sum())
                equal = pair.bad & (apart.detach() == 0)
                sums.append(_turn(live, directions.get(index), equal, apart.dtype))
            if index in self.retained:
                before = frozen[index][split if index in self.layers else 0 :].flatten(0, 1)
                live = x[split:].flatten(0, 1)
                live = norm(live) if self._is_normed_here(index) else live
                moved = representation_distance(live[None], before[None], pair.good, kind="l2")[0]
                if self.retain_distance == "relative":
                    moved = moved / torch.linalg.vector_norm(before, dim=-1, dtype=moved.dtype).clamp_min(1e-30)
                sums.append(moved.sum())
            return torch.stack(sums) if sums else x.new_zeros(0)

        return statistic

    def _combine(
        self, pair: Pair, numbers: Sequence[Tensor], zero: Tensor, ranks: DataRanks | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        rows = pair.bad.sum()
        rerouting = torch.stack([numbers[i][0] for i in self.layers])
        turns = torch.stack([numbers[i][1] for i in self.layers])
        distances = torch.stack([numbers[i][-1] for i in self.retained])
        tokens = pair.good.sum() if self.mask_padding else rows.new_tensor(pair.places)
        distances, rerouting, turns, rows, tokens = totals(ranks, distances, rerouting, turns, rows, tokens)
        progress = min((int(self.call) + 1) / self.schedule, 1.0)
        weights = {"retain_weight": self.alpha * progress, "rerouting_weight": self.alpha * (1 - progress)}
        parts = {
            "retain_per_state": distances / tokens,
            "rerouting_per_layer": rerouting / rows,
            "retain": distances.sum() / (tokens * len(self.retained)),
            "rerouting": rerouting.sum() / (rows * len(self.layers)),
            **{name: distances.new_full((), value) for name, value in weights.items()},
        }
        loss = parts["retain_weight"] * parts["retain"] + parts["rerouting_weight"] * parts["rerouting"]
        parts["loss"] = loss + zero.to(loss.dtype)
        nudge = parts["rerouting_weight"] * self.nudge * turns.sum() / (rows * len(self.layers))
        return parts, parts["loss"] + (nudge - nudge.detach())

    def _directions(self, frozen: Sequence[Tensor]) -> dict[int, Tensor]:
        """For each rerouted state a direction [D] of length 1, like its frozen one; the same on every rank."""
        found: dict[int, Tensor] = {}
        for index in self.layers if self.nudge else ():
            generator = torch.Generator().manual_seed(derived_seed("nudge", self.seed, index))
            row = torch.randn(frozen[index].shape[-1], generator=generator, dtype=torch.float64)
            found[index] = (row / torch.linalg.vector_norm(row)).to(frozen[index])
        return found

    def _named(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        last = f"(of 0 to {self.last})"
        values: dict[str, Tensor] = {}
        for i, value in zip(self.retained, parts["retain_per_state"], strict=True):
            of = f"the final norm of hidden state {i}" if self._is_normed_here(i) else f"hidden state {i}"
            values[f"retain distance of {of} {last}"] = value
        for i, value in zip(self.layers, parts["rerouting_per_layer"], strict=True):
            values[f"cosine of hidden state {i} {last}"] = value
        return values


def default_layers(depth: int) -> tuple[int, ...]:
    """The published hidden states 10 and 20 of 32 layers, at the same part of ``depth`` layers."""
    return tuple(dict.fromkeys(min(max(round(at * depth / 32), 1), depth) for at in (10, 20)))


def _turn(live: Tensor, direction: Tensor | None, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over ``rows`` of how far live [N, D] points in ``direction`` [D]; lengths are taken as constant."""
    if direction is None:
        return live.new_zeros((), dtype=dtype)
    lengths = torch.linalg.vector_norm(live.detach(), dim=-1, dtype=dtype)
    return torch.where(rows, (live @ direction.to(live.dtype)).to(dtype) / lengths.clamp_min(1e-30), 0).sum()
