"""Losses on a language model's output distribution without its [B, T, V] logits, shared by several defenses.

Every loss is arithmetic on ``lm_head_stats`` of the final norm's output, which a tap takes where it arises; the
model itself is asked for the logits of one position. The same forward can also measure how far its hidden states
are from a reference's, as TAR's retain loss does (Tamirisa et al. 2024, arXiv 2408.00761).

Shapes: B samples, T tokens, L layers, D hidden size, N rows that carry loss.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastguard.losses import guards, tapped
from fastguard.ops.lm_head_stats.op import LMHeadStats
from fastguard.ops.representation_distance import representation_distance
from fastguard.over_ranks import mean, totals, weighted
from fastguard.ranks import DataRanks
from fastguard.taps import Lens, Structure, find_structure

KINDS = ("cross_entropy", "max_entropy", "log_one_minus_p")
POSITIONS = ("all", "labels")
DISTANCES = ("l2", "cosine", "absolute_cosine")


class Output(NamedTuple):
    """What a forward found of its output and its hidden states."""

    stats: LMHeadStats | None
    distances: dict[int, Tensor]


class OutputScope(tapped.Reading[Output]):
    """A forward of which the output's statistics are read, and the distances of its hidden states if asked for.

    Args:
        lens: the head. tokens: rows of the output and their targets, each [N], to be read through it; None: nothing.
        with_mean: see ``lm_head_stats``.
        distance: from a hidden state's index and its value [B, T, D] to a statistic, or None.
        states: how many hidden states there are to be measured.
    """

    stats: LMHeadStats | None
    distances: dict[int, Tensor]

    def __init__(
        self, lens: Lens | None, tokens: tuple[Tensor, Tensor] | None, with_mean: bool = False,
        distance: Callable[[int, Tensor], Tensor] | None = None, states: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.lens, self.tokens, self.with_mean = lens, tokens, with_mean
        self.distance, self.states = distance, states
        self.end()

    def observe(self, kind: str, index: int, x: Tensor, keep: bool) -> None:
        """See `Scope.observe`: a hidden state, of which the last is the final norm's output."""
        if kind == "norm" and self.lens is not None and self.tokens is not None:
            stats = self.lens.statistics(x, *self.tokens, normed=True, keep=keep, with_mean=self.with_mean)
            if keep:
                self.stats = stats
        if self.distance is not None and kind in ("hidden", "norm"):
            distance = self.distance(index, x)
            if keep:
                self.distances[index] = distance

    def found(self) -> Output | None:
        """See `Reading.found`."""
        silent = (self.stats is None) != (self.tokens is None) or len(self.distances) != self.states
        return None if silent else Output(self.stats, self.distances)

    def end(self) -> None:
        """See `Scope.end`."""
        self.stats, self.distances = None, {}


class _StatesScope(tapped.Reading[tuple[Tensor, ...]]):
    """A forward whose hidden states, or what ``take`` makes of each, are kept, without gradient."""

    states: dict[int, Tensor]

    def __init__(
        self, count: int, device: torch.device | str | None, take: Callable[[int, Tensor], Tensor] | None
    ) -> None:
        super().__init__()
        self.count, self.device, self.take = count, device, take
        self.end()

    def observe(self, kind: str, index: int, x: Tensor, keep: bool) -> None:
        """See `Scope.observe`: a hidden state."""
        state = x.detach() if self.take is None else self.take(index, x.detach())
        self.states[index] = state if self.device is None else state.to(self.device)

    def found(self) -> tuple[Tensor, ...] | None:
        """See `Reading.found`."""
        return tuple(self.states[i] for i in range(self.count)) if len(self.states) == self.count else None

    def end(self) -> None:
        """See `Scope.end`."""
        self.states = {}


def saved_where_it_lies(original: Tensor, copy: Tensor) -> contextlib.AbstractContextManager[object]:
    """Where ``copy`` is one on another device, what autograd saves of it is ``original``, copied again in the backward.

    References that are kept on the host so take one state's room on the device, not L + 1. In compiled code the copies
    are kept.
    """
    if copy is original or torch.compiler.is_compiling():
        return contextlib.nullcontext()
    device, address = copy.device, copy.data_ptr()

    def pack(saved: Tensor) -> Tensor | None:
        return None if saved.data_ptr() == address and saved.shape == original.shape else saved

    def unpack(packed: Tensor | None) -> Tensor:
        return original.to(device, non_blocking=True, copy=True) if packed is None else packed

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class _Distance:
    """The mean distance of a hidden state from its reference; see ``distance_to`` of `LanguageModelLoss`."""

    def __init__(self, references: Sequence[Tensor], kind: str, mask: Tensor | None) -> None:
        self.references, self.kind = references, kind
        self.mask = None if mask is None else mask.reshape(-1)
        self.count = None if mask is None else mask.sum().clamp_min(1)

    def __call__(self, index: int, x: Tensor) -> Tensor:
        reference = self.references[index]
        if reference.shape != x.shape:
            raise ValueError(
                f"distance_to[{index}]: expected the shape of that hidden state {tuple(x.shape)}, got "
                f"{tuple(reference.shape)}"
            )
        width = x.shape[-1]
        a, reference = x.reshape(1, -1, width), reference.reshape(1, -1, width)
        b = reference.to(x.device, non_blocking=True)
        with saved_where_it_lies(reference, b):
            distance = representation_distance(a, b, self.mask, kind="l2" if self.kind == "l2" else "cosine")
        if self.kind == "absolute_cosine":
            distance = 1 - (1 - distance).abs()
            if self.mask is not None:
                distance = torch.where(self.mask, distance, 0)
        return distance.mean() if self.count is None else distance.sum() / self.count

    def tokens(self, batch: Mapping[str, Tensor]) -> Tensor | int:
        """How many the mean is over."""
        return batch["input_ids"].numel() if self.count is None else self.count


class LanguageModelLoss(guards.Uncopied):
    """Losses of a causal language model on plain batches.

    It is no ``nn.Module``: it has no parameters and no state. Construct it before the model's first compiled call
    and before wrapping by DDP or FSDP, and hand the wrapped model to each call. Works under activation
    checkpointing; several calls may come before one backward. It cannot be copied or pickled.

    Args:
        model: a Hugging Face causal language model, also PEFT, compiled or wrapped.
        filter_tol: as for ``lm_head_stats``; 0 is exact, None the default of the dtype: in fp32 and bf16 the gradient
            may then replace up to 5% of each row's probability outside its target by a rank-one tail.
        keep_logits_bytes: of the output, as for ``lm_head_stats``: None keeps up to 128 MiB of a call's logits for its
            backward on a CPU, and none on other devices.
        structure: what ``find_structure`` found for the model, if the caller has it already.
        check_finite: False leaves that to a caller who asks all ranks at once, and spares a wait for the device; an
            error on one rank alone would leave the others in their next collective call.
        over_ranks: whether means are over the samples of all data ranks, so that the engine's average of gradients is
            the gradient of the undivided batch; False: of this rank's, as the engine's own losses are. Calls without
            gradients are this rank's in any case.

    Attributes:
        tapped: the model with this loss's taps on it, for readings of other kinds (see ``losses/tapped.py``).
        components: of the last call, detached: ``loss``, the loss under the name of its kind, and with
            ``distance_to`` also ``representation_distance`` and ``distance_per_state`` [L + 1].

    Raises:
        ValueError: the model has no findable head, final norm or layers; a filter_tol out of range.
    """

    def __init__(
        self, model: nn.Module, *, filter_tol: float | None = 0.0, structure: Structure | None = None,
        check_finite: bool = True, over_ranks: bool = False, keep_logits_bytes: int | None = None,
    ) -> None:  # fmt: skip
        guards.a_filter_tol(filter_tol)
        guards.a_keep_logits_bytes(keep_logits_bytes)
        self.structure = find_structure(model) if structure is None else structure
        tapped.warn_of_full_logits(self.structure)
        self.filter_tol, self.check_finite = filter_tol, check_finite
        self.keep_logits_bytes = keep_logits_bytes
        self.components: dict[str, Tensor] = {}
        self.tapped = tapped.Tapped("LanguageModelLoss", model, self.structure, over_ranks=over_ranks)
        self._finalizer = weakref.finalize(self, self.tapped.taps.close)
        self._finalizer.atexit = False

    def __call__(
        self,
        batch: Mapping[str, Tensor],
        kind: str | None = "cross_entropy",
        model: nn.Module | None = None,
        *,
        positions: str = "all",
        cut: float = -15.0,
        distance_to: Sequence[Tensor] | None = None,
        distance_kind: str = "l2",
        distance_weight: float = 1.0,
        distance_mask: Tensor | None = None,
    ) -> Tensor:
        """The loss of one batch, 0-dim, in fp32 (float64 for a float64 model).

        Args:
            batch: ``input_ids`` [B, T], usually ``attention_mask`` [B, T], optionally ``labels`` and whatever else
                the model takes. A position carries loss if it predicts a label other than -100; without labels a
                token that the attention mask keeps; without a mask every token.
            kind: ``cross_entropy``: the mean over those tokens of -log p, as the model's own loss.
                ``max_entropy``: minus the mean over positions of the entropy of the whole distribution (TAR).
                ``log_one_minus_p``: minus the mean over those tokens of log(1 - p), to be minimised where the tokens
                shall not be said ("min posterior" of TAR's code). None: no loss on the output.
            model: the model as wrapped by DDP, FSDP or accelerate after construction; may be left out with one
                process, and where FSDP2 shards the model in place.
            positions: of ``max_entropy``: ``all`` (published: padding and prompt too) or ``labels``, those that
                predict a token that carries loss.
            cut: of ``log_one_minus_p``: tokens with log p under it carry no loss, but count in the mean (published).
            distance_to: L + 1 reference hidden states [B, T, D], as ``hidden_states`` returns them; entry i is asked
                for when state i arises, and may lie on another device and in another dtype. Adds distance_weight *
                the mean over the states of the mean distance of a token.
            distance_kind: ``l2`` (TAR's retain term), ``cosine``: 1 - cos, or ``absolute_cosine``: 1 - |cos| (TAR's
                Random Mapping); see ``representation_distance``.
            distance_mask: [B, T] bool, the tokens that count; None counts all, padding included (published).

        Raises:
            ValueError: a batch none of whose tokens carries loss, an unknown kind, references that do not fit; model
                left out although several processes train a model that is neither wrapped nor sharded.
            FloatingPointError: a component is not finite; the message names it.
            RuntimeError: taps that did not fire, or a checkpoint around them that drops gradients (reentrant form);
                head, norm or layers were replaced after construction; the loss was closed.
        """
        self._check(batch, kind, positions, distance_to, distance_kind, distance_mask)
        tokens = None if kind is None else _rows(batch, kind, positions)
        distance = None if distance_to is None else _Distance(distance_to, distance_kind, distance_mask)
        states = len(self.structure.layers) + 1 if distance_to is not None else 0
        with self.tapped.call(model, None if tokens is None else self._lens) as call:
            scope = OutputScope(call.lens, tokens, kind == "max_entropy", distance, states)
            stats, distances = call.read(batch, scope)
            loss, parts = call.zero, dict[str, Tensor]()
            if kind is not None and stats is not None:
                parts[kind] = mean(_of_rows(stats, kind, cut), call.ranks)
                loss = loss + parts[kind]
            if distance is not None:
                local = torch.stack([distances[i] for i in range(len(distances))])
                parts["distance_per_state"] = weighted(local, distance.tokens(batch), call.ranks)
                parts["representation_distance"] = parts["distance_per_state"].mean()
                loss = loss + distance_weight * parts["representation_distance"]
            parts["loss"] = loss
            if self.check_finite:
                tapped.check_finite("LanguageModelLoss", _named(parts))
            self.components = {name: value.detach() for name, value in parts.items()}
            return call.gated(loss)

    def each(
        self, batch: Mapping[str, Tensor], count: int, kind: str = "cross_entropy", model: nn.Module | None = None, *,
        positions: str = "all",
    ) -> Tensor:  # fmt: skip
        """The losses of ``count`` batches that follow one another in ``batch``, in one forward: [count].

        Args:
            batch: as for a call, [count * B, T]: B samples of the first batch, then B of the second (``joined``).
            kind, model, positions: as for a call.

        Raises ValueError where the samples cannot be divided by ``count`` or one of the batches has no token that
        carries loss; else as a call.
        """
        self._check(batch, kind, positions, None, "l2", None)
        ids = batch["input_ids"]
        if count < 1 or ids.shape[0] % count:
            raise ValueError(f"count: expected a number of batches that divides {ids.shape[0]} samples, got {count}")
        tokens = _rows(batch, kind, positions)
        with self.tapped.call(model, self._lens) as call:
            stats = call.read(batch, OutputScope(call.lens, tokens, kind == "max_entropy")).stats
            assert stats is not None
            values = _of_rows(stats, kind, -15.0)
            both = values.new_zeros(2, ids.numel())  # no two rows share a place: sums in one order
            own = both[0].index_copy(0, tokens[0], values).view(count, -1).sum(1)
            carried = both[1].index_fill(0, tokens[0], 1).view(count, -1).sum(1)
            if count > 1 and not carried.all():  # of one it is known
                raise ValueError(f"batch: {tapped.NOTHING} in number {int(carried.argmin())} of {count}")
            total, number = totals(call.ranks, own, carried)
            loss = total / number + call.zero
            if self.check_finite:
                tapped.check_finite("LanguageModelLoss", {f"{kind} of batch {i}": v for i, v in enumerate(loss)})
            self.components = {kind: loss.detach()}
            return call.gated(loss)

    def sequence_logp(self, batch: Mapping[str, Tensor], model: nn.Module | None = None) -> Tensor:
        """log p of each sample's tokens that carry loss, summed: [B], fp32 (float64 for a float64 model).

        What DPO and NPO are made of; a sample without such tokens has 0. Arguments and errors as in a call.
        """
        rows, target = tapped.next_tokens(batch, "batch")
        with self.tapped.call(model, self._lens) as call:
            stats = call.read(batch, OutputScope(call.lens, (rows, target))).stats
            assert stats is not None
            ce = stats.cross_entropy()
            by_position = ce.new_zeros(batch["input_ids"].numel()).index_copy(0, rows, -ce)  # no two share a place
            logp = by_position.view(batch["input_ids"].shape).sum(1) + call.zero
            if self.check_finite:
                names = {f"sequence_logp of sample {i}": value for i, value in enumerate(logp)}
                tapped.check_finite("LanguageModelLoss", names)
            self.components = {"sequence_logp": logp.detach()}
            return call.gated(logp)

    def statistics(
        self, batch: Mapping[str, Tensor], statistic: Callable[[int, Tensor, bool], Tensor],
        model: nn.Module | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """What ``statistic`` makes of each of the L + 1 hidden states of one forward, in their order.

        They may be differentiated together or apart; what is left out costs a backward nothing.

        Args:
            statistic: from a state's index, the state [B, T, D] (see `hidden_states`) and whether its result is kept
                (False in a recomputation, see ``taps.Scope``) to a vector, empty where the state is not read. It runs
                where the state arises, so that no state is held for the loss's sake.
            batch, model: as in a call.
        """
        with self.tapped.call(model) as call:
            return call.numbers(batch, statistic)

    def hidden_states(
        self, batch: Mapping[str, Tensor], model: nn.Module | None = None, device: torch.device | str | None = None,
        take: Callable[[int, Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """The L + 1 hidden states [B, T, D] of one forward, without gradient: references for ``distance_to``.

        They are transformers' ``hidden_states``: the first layer's input, the outputs of all layers but the last,
        and the final norm's output.

        Args:
            batch, model: as in a call. device: where to keep them; each is moved as it arises.
            take: from a state's index and the state to what is kept of it; None keeps the state.
        """
        with torch.no_grad(), self.tapped.call(model) as call:
            return call.read(batch, _StatesScope(len(self.structure.layers) + 1, device, take))

    def _lens(self) -> Lens:
        return Lens(self.structure, output_tol=self.filter_tol, keep_logits_bytes=self.keep_logits_bytes)

    def _check(
        self, batch: Mapping[str, Tensor], kind: str | None, positions: str, distance_to: Sequence[Tensor] | None,
        distance_kind: str, distance_mask: Tensor | None,
    ) -> None:  # fmt: skip
        guards.a_batch(batch, "batch")
        ids = batch.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            raise ValueError("batch: expected input_ids of shape [B, T]")
        for name, value, choices in (
            ("kind", kind, (*KINDS, None)),
            ("positions", positions, POSITIONS),
            ("distance_kind", distance_kind, DISTANCES),
        ):
            if value not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(map(str, choices))}, got {value!r}")
        if kind is None and distance_to is None:
            raise ValueError("kind: expected a loss where there is no distance_to, got None")
        if distance_to is not None and len(distance_to) != (states := len(self.structure.layers) + 1):
            raise ValueError(f"distance_to: expected {states} hidden states, got {len(distance_to)}")
        if distance_mask is not None and (distance_mask.dtype != torch.bool or distance_mask.shape != ids.shape):
            raise ValueError(
                f"distance_mask: expected bool {tuple(ids.shape)}, got {distance_mask.dtype} "
                f"{tuple(distance_mask.shape)}"
            )

    def close(self) -> None:
        """Remove the hooks from the model; the loss is of no use afterwards."""
        self._finalizer()


def _named(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """0-dim components under the names that an error gives them."""
    named: dict[str, Tensor] = {}
    for name, value in parts.items():
        if name == "distance_per_state":
            named |= {f"distance of hidden state {i} (of 0 to {len(value) - 1})": v for i, v in enumerate(value)}
        else:
            named[name] = value
    return named


def _rows(batch: Mapping[str, Tensor], kind: str, positions: str) -> tuple[Tensor, Tensor]:
    """Rows of the output that a loss of ``kind`` reads, and their targets."""
    if kind != "max_entropy" or positions != "all":
        return tapped.next_tokens(batch, "batch")
    rows = torch.arange(batch["input_ids"].numel(), device=batch["input_ids"].device)
    return rows, torch.zeros_like(rows)  # no target matters to the entropy, but a row needs one


def _of_rows(stats: LMHeadStats, kind: str, cut: float) -> Tensor:
    """The loss of ``kind`` of each of the rows that carry it."""
    if kind == "cross_entropy":
        return stats.cross_entropy()
    if kind == "max_entropy":
        assert stats.mean_logit is not None
        return stats.mean_logit - stats.lse
    # -log(1 - p) as a softplus of logits: lse - rest_lse would cancel, value and gradient, where p is small.
    loss = torch.nn.functional.softplus(stats.target_logit - stats.rest_lse, threshold=40.0)
    return torch.where(-stats.cross_entropy() < cut, 0, loss)  # this way round a NaN stays one


def dpo_loss(
    chosen_logp: Tensor, rejected_logp: Tensor, ref_chosen_logp: Tensor, ref_rejected_logp: Tensor, beta: float = 0.1,
    ranks: DataRanks | None = None,
) -> Tensor:  # fmt: skip
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290), the mean over pairs, 0-dim.

    -log sigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected))).

    Args:
        chosen_logp, rejected_logp: [B], of the model that is trained (see `LanguageModelLoss.sequence_logp`).
        ref_chosen_logp, ref_rejected_logp: [B], of the reference.
        beta: how strongly the reference holds.
        ranks: whose pairs the mean is over (``fastguard.ranks.data_ranks``); None: this rank's alone.
    """
    given = (chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp)
    if len({t.shape for t in given}) != 1:
        raise ValueError(f"dpo_loss: expected four tensors of one shape, got {[tuple(t.shape) for t in given]}")
    margin = (chosen_logp - ref_chosen_logp) - (rejected_logp - ref_rejected_logp)
    return -mean(torch.nn.functional.logsigmoid(beta * margin), ranks)
