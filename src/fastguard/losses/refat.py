"""Refusal-feature adversarial training as a drop-in loss (Yu et al. 2024, arXiv 2409.20089).

    loss = CE(refusal | with probability p a sample's refusal features ablated) + retain_weight * CE(retain)

A refusal feature is a direction of a layer's input: the mean of harmful prompts less that of harmless ones, at the
last token before the answer. Ablation takes it out of all that the layer reads and writes, at all positions: its input,
what attention adds (inside ``add_project_rms_norm`` where the layer has the common form), what the MLP adds. Each layer
has directions of its own, which are constants to the backward.

Published training estimates them every four steps from 32 + 32 prompts in forwards of their own. Here they come out of
the training's forwards: each shows the last prompt token of its samples at every layer's input, and of the samples that
were not ablated the means are taken. That is no forward more, and it is a deviation: the prompts are the batch's, and
the weights those of the last few steps. `ReFATLoss.estimate` is the published way.

Beyond the paper, ``directions`` above 1: the ablated samples show what refusal rests on *without* the features that are
known. Their mean, less the harmless one, without its part along the known directions, is the next direction: that which
an attacker finds who estimates again under his ablation. Harmless samples are never ablated, so that their mean under
ablation is taken to be their mean, projected.

Shapes: B samples, T tokens, L layers, D features, N of the layers ablated, K directions a layer.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastguard.directions.estimate import estimate
from fastguard.directions.stream import Ablation, Stream
from fastguard.losses import guards, tapped
from fastguard.losses.pieces import divided, pieces
from fastguard.nested.guard import derived_seed
from fastguard.ops.class_moments import class_moments_
from fastguard.ops.precision import accumulation_dtype
from fastguard.over_ranks import gathered, mean, several, summed, totals
from fastguard.ranks import DataRanks, data_ranks
from fastguard.taps import Lens, find_structure

CHOSEN = "chosen"
"""A batch's entry that goes with its samples where they are divided: which run ablated."""

HARMFUL, HARMLESS, ABLATED = range(3)
"""Classes of samples; the last are harmful ones that ran ablated."""

INDEPENDENT = 1e-3
"""The share of a direction that must be left without those before it."""

EARLIEST = 0.25
"""The share of the layers, from below, that the paper leaves alone."""


class _Found(NamedTuple):
    """Of one forward: cross-entropies [rows] and the last prompt tokens [B, N, D]."""

    ce: Tensor
    prompts: Tensor


class _Scope(tapped.Reading[_Found]):
    """A forward whose answers are read at the output, and whose prompts' ends at the layers' inputs.

    Args:
        lens: the head. tokens: rows of the output and their targets. ends: [B] the last prompt token of each sample.
        layers: whose inputs are read.
    """

    ce: Tensor | None
    prompts: dict[int, Tensor]

    def __init__(self, lens: Lens | None, tokens: tuple[Tensor, Tensor], ends: Tensor, layers: Sequence[int]) -> None:
        super().__init__()
        assert lens is not None
        self.lens, self.tokens, self.ends, self.layers = lens, tokens, ends, layers
        self.end()

    def observe(self, kind: str, index: int, x: Tensor, keep: bool) -> None:
        """See `Scope.observe`: a hidden state, of which the last is the final norm's output."""
        if kind == "norm":
            ce = self.lens.cross_entropy(x, *self.tokens, normed=True, keep=keep)
            if keep:
                self.ce = ce
        elif keep and index in self.layers:
            self.prompts[index] = x.detach()[torch.arange(len(self.ends), device=x.device), self.ends.to(x.device)]

    def found(self) -> _Found | None:
        """See `Reading.found`."""
        if self.ce is None or len(self.prompts) != len(self.layers):
            return None
        rows = [self.prompts[i] for i in self.layers]
        return _Found(self.ce, torch.stack([row.to(rows[0].device) for row in rows], 1))

    def end(self) -> None:
        """See `Scope.end`."""
        self.ce, self.prompts = None, {}


class ReFATLoss(guards.Uncopied, nn.Module):
    """The loss of refusal-feature adversarial training.

        loss_fn = ReFATLoss(model)                          # before compilation, DDP and FSDP2
        loss = loss_fn(refusal=..., retain=..., model=wrapped)

    The model is not a submodule: the loss has no parameters, and its state_dict holds the directions, the means that
    they are made of and the counters. The first call finds the first directions and ablates nothing. Which samples are
    ablated is a function of (seed, call, index of the sample among all ranks'). Under DDP and FSDP2 the means are those
    of all ranks' samples. A call without gradients evaluates: it ablates as the training call to come, and moves
    nothing. The loss cannot be copied or pickled.

    Args:
        model: a Hugging Face causal language model, also PEFT, compiled or wrapped.
        p: the probability with which a harmful sample is ablated; below 1, since the features are those of samples that
            are not; 0 is plain fine-tuning on refusals.
        every: after how many calls the directions are estimated again, from the samples since then; None: never,
            `estimate` is called instead.
        layers: which layers are ablated; None: all but the first quarter.
        seed: of the draws.
        directions: K, how many a layer at most; those after the first are what the ablated samples still show.
        samples: at most so many prompts' weight the means of earlier samples have.
        retain_weight: weight of the cross-entropy on ``retain``.
        filter_tol: as for ``lm_head_stats``; 0 is exact.
        keep_logits_bytes: of the output, as for ``lm_head_stats``: None keeps up to 128 MiB of a call's logits for its
            backward on a CPU, and none on other devices.
        check_finite: False leaves it to a caller who asks all ranks at once.
        over_ranks: whether means are over the samples of all data ranks, so that the engine's average of gradients is
            the gradient of the undivided batch; False: of this rank's, as the engine's own losses are. Calls without
            gradients are this rank's in any case.

    Attributes:
        components: of the last call with gradients, 0-dim and detached: ``loss``, ``refusal_ce``, ``retain_ce``,
            ``ablated`` (the share of samples), and of the samples that were and were not, where there are any,
            ``refusal_ce_ablated`` and ``refusal_ce_plain``.
        evaluation: the same of the last call without gradients.

    Raises:
        ValueError: the model has no findable head, final norm, layers or writes to the stream; an option out of range.
    """

    call: Tensor
    since: Tensor
    counts: Tensor
    means: Tensor
    rests: Tensor | None
    held: Tensor
    running: Tensor
    basis: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        p: float = 0.5,
        every: int | None = 4,
        layers: Sequence[int] | None = None,
        seed: int = 0,
        directions: int = 1,
        samples: int = 32,
        retain_weight: float = 1.0,
        filter_tol: float | None = 0.0,
        check_finite: bool = True,
        over_ranks: bool = False,
        keep_logits_bytes: int | None = None,
    ) -> None:
        super().__init__()
        guards.not_negative(p=p, retain_weight=retain_weight)
        if p >= 1:
            raise ValueError(f"p: expected 0 <= p < 1, got {p!r}")
        for name, value in (("every", 1 if every is None else every), ("directions", directions), ("samples", samples)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an int >= 1, got {value!r}")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(f"seed: expected an int, got {seed!r}")
        guards.a_filter_tol(filter_tol)
        guards.a_keep_logits_bytes(keep_logits_bytes)
        self.structure = find_structure(model)
        depth = len(self.structure.layers)
        self.layers = tuple(range(int(EARLIEST * depth), depth)) if layers is None else tuple(sorted(layers))
        if not self.layers or len(set(self.layers)) < len(self.layers) or not set(self.layers) <= set(range(depth)):
            raise ValueError(f"layers: expected some of 0 to {depth - 1}, each once, got {self.layers}")
        width: int = self.structure.head.weight.shape[1]  # type: ignore[index, union-attr, assignment]
        if directions > min(64, width - 1):
            raise ValueError(f"directions: expected at most {min(64, width - 1)}, got {directions}")
        tapped.warn_of_full_logits(self.structure)
        self.p, self.every, self.seed, self.samples = float(p), every, seed, samples
        self.directions, self.retain_weight = directions, retain_weight
        self.filter_tol, self.check_finite = filter_tol, check_finite
        self.keep_logits_bytes = keep_logits_bytes
        self.components: dict[str, Tensor] = {}
        self.evaluation: dict[str, Tensor] = {}
        self._tapped = tapped.Tapped(  # its hooks see what comes before ablation
            "ReFATLoss", model, self.structure, over_ranks=over_ranks
        )
        self._stream = Stream(model, self.structure, lasting=True)
        self._make_state()
        self._ablation: Ablation | None = None
        self._finalizer = weakref.finalize(self, _close, self._tapped, self._stream)
        self._finalizer.atexit = False

    def _make_state(self) -> None:
        weight: Tensor = self.structure.head.weight  # type: ignore[assignment]
        wide = accumulation_dtype(weight.dtype)
        shape = len(self.layers), self._stream.width

        def zeros(*lead: int) -> Tensor:
            return torch.zeros(*lead, *shape, dtype=wide, device=weight.device)

        self.register_buffer("call", torch.zeros((), dtype=torch.int64))
        self.register_buffer("since", torch.zeros((), dtype=torch.int64))
        self.register_buffer("counts", torch.zeros(3, dtype=torch.int64, device=weight.device))
        self.register_buffer("means", zeros(3))
        self.register_buffer("rests", zeros(3) if wide == torch.float32 else None)
        self.register_buffer("held", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("running", zeros(2))
        basis = torch.zeros(shape[0], self.directions, shape[1], dtype=torch.float64, device=weight.device)
        self.register_buffer("basis", basis)
        self.register_load_state_dict_post_hook(lambda module, keys: module._prepare())

    def forward(
        self,
        *,
        refusal: Mapping[str, Tensor],
        retain: Mapping[str, Tensor],
        model: nn.Module | None = None,
        sample_offset: int | None = None,
    ) -> Tensor:
        """The loss of one batch of each kind, 0-dim, in fp32 (float64 for a float64 model).

        Args:
            refusal: harmful prompts with refusals: ``input_ids`` [B, T], usually ``attention_mask``, and ``labels``,
                -100 on prompt and padding.
            retain: harmless prompts with answers, of any shape, likewise.
            model: the model as wrapped by DDP, FSDP or accelerate after construction; may be left out with one
                process, and where FSDP2 shards the model in place.
            sample_offset: index of the first refusal sample among all ranks'; by default data rank * B.

        Raises:
            ValueError: batches that do not fit, without labels or without a prompt before them; model left out where
                the ranks would drift apart.
            FloatingPointError: a component is not finite; the message names it.
            RuntimeError: taps that did not fire, or a checkpoint around them that drops gradients (reentrant form);
                head, norm or layers were replaced after construction; the loss was closed.
        """
        tokens, ends = zip(*(_answers(b, n) for n, b in (("refusal", refusal), ("retain", retain))), strict=True)
        training = torch.is_grad_enabled()
        chosen, every = self._begun(len(refusal["input_ids"]), model, sample_offset)
        with self._tapped.call(model, self._lens) as call:
            with self._ablated(chosen, every) as first:
                harmful = call.read(refusal, _Scope(call.lens, tokens[0], ends[0], self.layers))
            with self._stream.plain() as second:
                harmless = call.read(retain, _Scope(call.lens, tokens[1], ends[1], self.layers))
            where = chosen.to(harmful.ce.device)[tokens[0][0] // refusal["input_ids"].shape[1]]
            parts = self._parts(harmful.ce, harmless.ce, where, every, call.ranks)
            loss = parts["loss"] + call.zero.to(parts["loss"].dtype)
            if self.check_finite:
                tapped.check_finite("ReFATLoss", parts)
            figures = {name: value.detach() for name, value in parts.items()}
            if training:
                self.components = figures
                self._take(harmful.prompts, torch.where(chosen, ABLATED, HARMFUL))
                self._take(harmless.prompts, torch.full((len(harmless.prompts),), HARMLESS))
                self.call += 1
                self.since += 1
            else:
                self.evaluation = figures
            return self._stream.gated(call.gated(loss), (first, second))

    def passes(
        self, *, refusal: Mapping[str, Tensor], retain: Mapping[str, Tensor], micro: int,
        model: nn.Module | None = None,
    ) -> list[Callable[[], Tensor]]:  # fmt: skip
        """The loss of a training call as a sum of several, each what a function returns that runs a forward of its own.

        They are run and differentiated in their order, so that the activations of at most ``micro`` samples are there
        at a time. After the last, ``components`` are those of the call, and the counters have moved.

        Args and errors: as in a call.
        """
        ranks = data_ranks(self._tapped.model if model is None else model) if self._tapped.over_ranks else None
        chosen, every = self._begun(len(refusal["input_ids"]), model, None)
        found: list[Callable[[], Tensor]] = []
        read: dict[str, list[Tensor]] = {"refusal": [], "retain": [], "where": []}

        def plain(name: str, batch: dict[str, Tensor], total: Tensor, weight: float) -> Tensor:
            ablated = batch.pop(CHOSEN)
            tokens, ends = _answers(batch, name)
            with self._tapped.call(model, self._lens) as call:
                with self._ablated(ablated, every) if name == "refusal" else self._stream.plain() as scope:
                    got = call.read(batch, _Scope(call.lens, tokens, ends, self.layers))
                kinds = torch.where(ablated, ABLATED, HARMFUL) if name == "refusal" else torch.full_like(ends, HARMLESS)
                self._take(got.prompts, kinds)
                read[name].append(got.ce.detach())
                if name == "refusal":
                    read["where"].append(ablated.to(got.ce.device)[tokens[0] // batch["input_ids"].shape[1]])
                if sum(map(len, (read["refusal"], read["retain"]))) == len(found):
                    harmful, harmless, where = (torch.cat(read[part]) for part in read)
                    self.components = self._parts(harmful, harmless, where, every, call.ranks)
                    self.call += 1
                    self.since += 1
                ce, number = totals(call.ranks, got.ce.sum(), total)
                loss = weight * (ce / number) + call.zero.to(ce.dtype)
                return self._stream.gated(call.gated(loss), (scope,))

        for name, batch, weight in (("refusal", refusal, 1.0), ("retain", retain, self.retain_weight)):
            total = tapped.carrying(batch, name).sum()
            marked = {**batch, CHOSEN: chosen if name == "refusal" else torch.zeros(len(batch["input_ids"]))}
            for piece in divided(marked, pieces(batch, micro, ranks)):
                found.append(partial(plain, name, piece, total, weight))
        return found

    def check(self, **batches: Mapping[str, Tensor]) -> None:
        """Raise the ValueError that a call would raise for batches that do not fit."""
        for name, batch in batches.items():
            _answers(batch, name)

    def estimate(self, harmful: Iterable[Mapping[str, Tensor]], harmless: Iterable[Mapping[str, Tensor]]) -> None:
        """Find each layer's first direction as published: from prompts alone, in forwards of their own.

        With ``every=None`` call it every four steps; else it only begins. The means of samples so far are forgotten.

        Args:
            harmful, harmless: batches as ``fastguard.directions.estimate`` takes them; published: 32 prompts of each.
        """
        found = estimate(self._tapped.model, harmful, harmless, positions=1, structure=self.structure)
        for kind, means in ((HARMFUL, found.harmful), (HARMLESS, found.harmless)):
            self.running[kind] = means[0, list(self.layers)].to(self.running)
        self.held.copy_(torch.tensor(found.counts))
        self._forget()
        self._choose(None)

    def check_components(self) -> None:
        """Raise a FloatingPointError that names the first component of the last call that is not finite."""
        tapped.check_finite("ReFATLoss", self.components)

    def bases(self) -> dict[int, Tensor]:
        """The directions of each layer that has some, [K, D] in float64, orthonormal, the difference in means first."""
        lives = self.basis.abs().amax(-1).cpu() > 0
        return {layer: self.basis[i, lives[i]] for i, layer in enumerate(self.layers) if lives[i].any()}

    def close(self) -> None:
        """Remove the hooks from the model and give its layers their own forwards; the loss is of no use afterwards."""
        self._finalizer()

    # ------------------------------------------------------------------------------------------------------------------

    def _lens(self) -> Lens:
        return Lens(self.structure, output_tol=self.filter_tol, keep_logits_bytes=self.keep_logits_bytes)

    def _begun(self, count: int, model: nn.Module | None, sample_offset: int | None) -> tuple[Tensor, Tensor]:
        """Which of ``count`` samples of a call run ablated, and which of all ranks'; directions are renewed in time."""
        training, ranks = torch.is_grad_enabled(), data_ranks(self._tapped.model if model is None else model)
        if training and self.every is not None and (self._ablation is None or int(self.since) >= self.every):
            self._renew(ranks)
        before, whole = count * ranks.rank, None
        if self._tapped.over_ranks and training and several(ranks):
            sizes = [size for (size,) in gathered([count], ranks)]
            before, whole = sum(sizes[: ranks.rank]), sum(sizes)
        offset = before if sample_offset is None else sample_offset
        chosen = self._drawn(count, offset)
        return chosen, chosen if whole is None else self._drawn(whole, offset - before)

    def _drawn(self, count: int, offset: int) -> Tensor:
        """[B] bool: which samples run ablated in this call."""
        if self._ablation is None:
            return torch.zeros(count, dtype=torch.bool)
        generator = torch.Generator().manual_seed(derived_seed("refat", self.seed, int(self.call)))
        return torch.rand(offset + count, generator=generator, dtype=torch.float64)[offset:] < self.p

    def _ablated(self, chosen: Tensor, every: Tensor) -> contextlib.AbstractContextManager[Ablation]:
        """Ablation of the samples ``chosen``; ``every``: of all ranks, which run one form of the model alike."""
        if self._ablation is None or not every.any():
            return self._stream.plain()
        return self._stream.ablated(self._ablation.of(torch.where(chosen, 0, -1)))

    def _parts(
        self, harmful: Tensor, harmless: Tensor, where: Tensor, chosen: Tensor, ranks: DataRanks | None
    ) -> dict[str, Tensor]:
        """The loss and its components, of cross-entropies [rows].

        where: which of the harmful rows are of samples that ran ablated. chosen: the samples that did, of all ranks.
        """
        parts = {"refusal_ce": mean(harmful, ranks), "retain_ce": mean(harmless, ranks).to(harmful.device)}
        parts["loss"] = parts["refusal_ce"] + self.retain_weight * parts["retain_ce"]
        parts["ablated"] = chosen.double().mean().to(harmful)
        if chosen.any():
            on = where.to(harmful.dtype)
            off = 1 - on
            ablated, plain, n, m = totals(ranks, (harmful * on).sum(), (harmful * off).sum(), on.sum(), off.sum())
            parts["refusal_ce_ablated"] = ablated / n
            if not chosen.all():
                parts["refusal_ce_plain"] = plain / m
        else:
            parts["refusal_ce_plain"] = parts["refusal_ce"]
        return parts

    def _take(self, prompts: Tensor, kind: Tensor) -> None:
        """Add rows [B, N, D] of samples of these kinds to the means since the last estimation."""
        if self.counts.device != prompts.device:
            for name in ("counts", "means", "rests", "running", "basis"):
                state = getattr(self, name)
                setattr(self, name, None if state is None else state.to(prompts.device))
        class_moments_(self.counts, self.means, self.rests, prompts, kind.to(prompts.device))

    @torch.no_grad()
    def _renew(self, ranks: DataRanks) -> None:
        """Estimate the directions from the samples since the last time; every rank calls it."""
        means = self.means.double() if self.rests is None else self.means.double() + self.rests.double()
        counts = self.counts.double()
        both = torch.cat([counts[:, None, None].expand(-1, 1, means.shape[-1]), means * counts[:, None, None]], 1)
        both = summed(both, ranks)
        counts, sums = both[:, 0, 0], both[:, 1:]
        number = [round(n) for n in counts.tolist()]
        for kind in (HARMFUL, HARMLESS):
            if number[kind]:
                kept = min(int(self.held[kind]), max(self.samples - number[kind], 0))
                self.held[kind] = kept + number[kind]
                self.running[kind] += ((sums[kind] / number[kind]) - self.running[kind]) * (
                    number[kind] / (kept + number[kind])
                )
        if not self.held.all():
            return  # a kind is missing: more samples are waited for
        ablated = sums[ABLATED] / number[ABLATED] if number[ABLATED] else None
        self._forget()
        self._choose(ablated)

    def _forget(self) -> None:
        """Begin new means, in place: a state that was handed out stays what it was only if it was copied."""
        for state in (self.counts, self.means, self.rests, self.since):
            if state is not None:
                state.zero_()

    @torch.no_grad()
    def _choose(self, ablated: Tensor | None) -> None:
        """New directions from the running means and, where there are some, the ablated samples' means [N, D]."""
        harmful, harmless = self.running.double()
        rows = [harmful - harmless]
        if self.directions > 1:
            known = self.basis
            if ablated is not None:
                left = _without(ablated - harmless, known)
                told = _lengths(left) > INDEPENDENT * _lengths(rows[0])
                rows.append(torch.where(told, left, 0))
            rows += known[:, 1:].unbind(1)
        scale = _lengths(harmful) + _lengths(harmless)
        self.basis.copy_(_orthonormal(rows, scale, self.directions))
        self._prepare()

    def _prepare(self) -> None:
        """What forwards ablate, from the basis."""
        bases = self.bases()
        index = torch.zeros(1, dtype=torch.int64)
        self._ablation = (
            self._stream.ablation({i: b[None] for i, b in bases.items()}, basis_index=index) if bases else None
        )


def _lengths(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=-1, keepdim=True)


def _without(rows: Tensor, basis: Tensor) -> Tensor:
    """Rows [N, D] without their part along each layer's basis [N, K, D]; twice, since once leaves rounding."""
    for _ in range(2):
        rows = rows - torch.einsum("nk,nkd->nd", torch.einsum("nd,nkd->nk", rows, basis), basis)
    return rows


def _orthonormal(rows: Sequence[Tensor], scale: Tensor, count: int) -> Tensor:
    """The first ``count`` directions of each layer [N, count, D] out of rows, each [N, D]; zeros where there are fewer.

    A row is left out where it is rounding beside ``scale`` [N, 1], or a combination of the rows before it.
    """
    basis = rows[0].new_zeros(len(rows[0]), count, rows[0].shape[1])
    taken = torch.zeros(len(rows[0]), dtype=torch.int64, device=basis.device)
    for i, row in enumerate(rows):
        left = _without(row, basis)
        length = _lengths(left)
        floor = 0 if i else 1e-6 * scale
        good = ((length > INDEPENDENT * _lengths(row)) & (length > floor))[:, 0] & (taken < count)
        if i:  # nothing is next where there was no first
            good &= taken > 0
        at = good.nonzero()[:, 0]
        basis[at, taken[at]] = (left / length)[at]
        taken[at] += 1
    return basis


def _answers(batch: Mapping[str, Tensor], name: str) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Rows that carry loss with their targets, and the last token [B] of each sample's prompt."""
    guards.a_batch(batch, name)
    if not isinstance(batch.get("labels"), Tensor):
        raise ValueError(f"{name}: expected labels [B, T], -100 on the prompt, whose last token is read; got none")
    tokens = tapped.next_tokens(batch, name)
    counts = batch["labels"] != -100
    first = counts.int().argmax(1)
    where = counts.any(1) & (first > 0)
    if "attention_mask" in batch:
        mask = batch["attention_mask"] != 0
        where &= mask.gather(1, (first - 1).clamp_min(0)[:, None])[:, 0]
    if not where.all():
        sample = int((~where).nonzero()[0])
        raise ValueError(
            f"{name}: expected a prompt and an answer in each sample, got none of one of them in sample {sample}"
        )
    return tokens, first - 1


def _close(tapped_: tapped.Tapped, stream: Stream) -> None:
    tapped_.taps.close()
    stream.close()
