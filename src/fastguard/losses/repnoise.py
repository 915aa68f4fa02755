"""Representation Noising as a drop-in loss (Rosati et al. 2024, arXiv 2405.14577).

loss = CE(harmless) + beta * noise - alpha * log(harmful / (L + 1) + 1)

with ``harmful`` the sum of the cross-entropies of the harmful answer read from the model's output and, through
final norm and head, from each of the L + 1 hidden states; ``noise`` the mean over the L layers of the MMD^2
between the MLP's outputs and Gaussian noise. The defaults are those of the published code, quirks included.

Both halves of the pair run as one concatenated batch, and every term is taken by a tap where its activation
arises: no activation is captured and no [B, T, V] logits are made.
"""

from __future__ import annotations

import math
import random
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastguard.losses import guards, paired, tapped
from fastguard.losses.gathered_mmd import Gathered
from fastguard.losses.language_model import OutputScope
from fastguard.losses.paired import Rows
from fastguard.losses.pieces import divided, pieces
from fastguard.ops.gaussian_mmd import gaussian_mmd
from fastguard.ops.philox import gaussian_noise
from fastguard.ops.precision import accumulation_dtype
from fastguard.over_ranks import mean, several, totals
from fastguard.ranks import DataRanks, data_ranks
from fastguard.taps import Lens, Taps, find_structure

LENS_TRANSFORMS = ("model", "none")

MASK = "token mask"
"""The entry under which it is divided with a batch."""

PRESETS: dict[str, dict[str, Any]] = {
    "published": {},
    "short_run": {"output_alpha": 5.0, "retain_weight": 1.5, "mask_padding": True, "boundary": "predicted"},
}
"""Named settings for `RepNoiseLoss.preset`; one with a ``retain_weight`` needs a retain batch."""


class _Pair(NamedTuple):
    """What the pair's forward found: of the output's rows [N], of each hidden state that is read, of each MLP."""

    output: Tensor
    hidden: dict[int, Tensor]
    mmd: dict[int, Tensor]


class _PairScope(tapped.Reading[_Pair]):
    """A forward of the harmful samples and, after them, the harmless ones, if they are not in a forward of their own.

    Args:
        lens: the head. batch, length: of the harmful half [B, T]. harmful, harmless: their rows in the concatenation.
        entries: the hidden states to read. layers: how many MLPs there are. noise: from an MLP's outputs [B, F] of the
            harmful half and its layer to their MMD^2.
    """

    output: Tensor | None
    hidden: dict[int, Tensor]
    mmd: dict[int, Tensor]

    def __init__(
        self, lens: Lens, batch: int, length: int, harmful: Rows, harmless: Rows, entries: frozenset[int],
        layers: int, noise: Callable[[Tensor, int], Tensor],
    ) -> None:  # fmt: skip
        super().__init__()
        self.lens, self.batch, self.length, self.harmful, self.entries = lens, batch, length, harmful, entries
        self.layers, self.noise = layers, noise
        self.rows = torch.cat([harmful.rows, harmless.rows])
        self.target = torch.cat([harmful.target, harmless.target])
        self.end()

    def observe(self, kind: str, index: int, x: Tensor, keep: bool) -> None:
        """See `Scope.observe`: an MLP's output, a hidden state, or the final norm's output."""
        if kind == "mlp":
            value = self.noise(x.reshape(-1, self.length, x.shape[-1])[: self.batch].flatten(1), index)
            if keep:
                self.mmd[index] = value
            return
        if kind == "norm":
            ce = self.lens.cross_entropy(x, self.rows, self.target, normed=True, keep=keep)
            if keep:
                self.output = ce
        if index in self.entries:
            ce = self.lens.cross_entropy(x, self.harmful.rows, self.harmful.target, normed=False, keep=keep).sum()
            if keep:
                self.hidden[index] = ce

    def found(self) -> _Pair | None:
        """See `Reading.found`."""
        if self.output is None or len(self.mmd) != self.layers or len(self.hidden) != len(self.entries):
            return None
        return _Pair(self.output, self.hidden, self.mmd)

    def end(self) -> None:
        """See `Scope.end`."""
        self.output, self.hidden, self.mmd = None, {}, {}


class RepNoiseLoss(guards.Uncopied, nn.Module):
    """The loss of Representation Noising on paired batches.

    The model is not a submodule: the loss has no parameters, its state_dict holds the noise counter alone, and
    ``.train()``, ``.to()`` do not reach the model. Construct it before the model's first compiled call and
    before wrapping by DDP or FSDP, and hand the wrapped model to each call. It cannot be copied or pickled; its
    state_dict can.

    Trained parameters in bf16 or fp16 are watched: if fewer than a quarter of them changed in the first and in the
    eighth step, one warning says how many (``losses/guards.py``). Most learning rates of fine-tuning are under bf16's
    spacing; load the model with ``dtype=torch.float32``, or train LoRA adapters in fp32.

    A call without gradients (``torch.no_grad``) evaluates: it uses the noise and the layers of the training call to
    come, and leaves the counter and ``components`` as they are, so that training goes on as if it had not been.
    ``model.eval()`` alone does not make an evaluation, since models are trained in that mode too.

    Warning: the published defaults did no more than plain safe fine-tuning in a short run (tens of steps on a
    135M model): the cross-entropy inside the logarithm starts near 25, so that alpha 1 hardly pulls. See the
    preset ``short_run`` for what did: ``RepNoiseLoss.preset(model, "short_run")`` with a ``retain`` batch.

    Args:
        model: a Hugging Face causal language model, also PEFT, compiled or wrapped.
        alpha: weight of the ascent on harmful answers. beta: weight of the noise term.
        seed: of the noise.
        filter_tol: of the inner hidden states, as for ``lm_head_stats``: 0 is exact, None the default of the dtype, in
            fp32 and bf16 an approximation of the gradient: per row, up to 5% of the probability outside the target is
            replaced by a rank-one tail (what that costs: docs/performance.md). Values and the output are exact.
        mask: ``difference`` (published: the tokens at which the two sequences differ) or ``labels``.
        mask_padding: leave padding out. The published code does not: where answers differ in length, the
            padding of the shorter one carries loss. True is recommended.
        boundary: ``constant`` (published) counts a surviving label as log V where the position that predicts
            it is masked out itself; ``predicted`` lets that position predict it.
        ignore_token_zero: published: a label that is token id 0 is ignored. False counts it.
        norm_last_twice: published: the last hidden state, already normed, goes through the norm again.
        layers: how many of the L + 1 hidden states are read per step, drawn afresh and weighted so that the sum
            inside the logarithm is unbiased; None reads all.
        retain_weight: weight of the cross-entropy on the ``retain`` batch, if one is given.
        output_alpha: weight of a further term, - output_alpha * log(CE + 1) of the harmful answers at the model's
            output alone; not in the published loss, where the output is one of L + 2 terms of a sum.
        lens_transform: ``model``: hidden states pass the model's own soft-cap and logit scale, as its output does;
            ``none``: they do not, as in the published code (Gemma 2, Cohere, Granite: elsewhere there is none).
        mlp_of: from a decoder layer to its MLP, where the model's structure does not tell.
        over_ranks: whether means are over the tokens, and the noise term over the samples, of all data ranks, so that
            the engine's average of gradients is the gradient of the undivided batch; each rank then compares the
            samples of all. False: of this rank's, as the engine's own losses are. Calls without gradients are this
            rank's in any case.
        keep_logits_bytes: of the output, as for ``lm_head_stats``: None keeps up to 128 MiB of a call's logits for its
            backward on a CPU, and none on other devices.

    Attributes:
        components: of the last call with gradients, detached: ``loss``, ``harmless_ce``, ``noise`` (mean),
            ``noise_per_layer`` [L], ``harmful_ce`` [L + 2] (model output, then each hidden state; NaN for those not
            read), what a log wants of it, ``harmful_ce_output`` and ``harmful_ce_lens`` (mean over the hidden states
            that were read), and ``retain_ce`` if there was a retain batch. All but the two vectors are 0-dim.
        evaluation: the same of the last call without gradients.

    Raises:
        ValueError: the model has no findable head, final norm or layers, or an option is out of range.
    """

    call: Tensor

    def __init__(
        self,
        model: nn.Module,
        alpha: float = 1.0,
        beta: float = 0.001,
        seed: int = 0,
        filter_tol: float | None = None,
        *,
        mask: str = "difference",
        mask_padding: bool = False,
        boundary: str = "constant",
        ignore_token_zero: bool = True,
        norm_last_twice: bool = True,
        layers: int | None = None,
        retain_weight: float = 1.0,
        output_alpha: float = 0.0,
        lens_transform: str = "model",
        mlp_of: Callable[[nn.Module], nn.Module] | None = None,
        over_ranks: bool = False,
        keep_logits_bytes: int | None = None,
    ) -> None:
        super().__init__()
        for name, value, choices in (("mask", mask, paired.MASKS), ("boundary", boundary, paired.BOUNDARIES)):
            if value not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
        guards.a_filter_tol(filter_tol)
        guards.a_keep_logits_bytes(keep_logits_bytes)
        guards.not_negative(alpha=alpha, beta=beta, retain_weight=retain_weight, output_alpha=output_alpha)
        if lens_transform not in LENS_TRANSFORMS:
            raise ValueError(f"lens_transform: expected {' or '.join(LENS_TRANSFORMS)}, got {lens_transform!r}")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(f"seed: expected an int, got {seed!r}")
        self.structure = find_structure(model, mlp_of)
        entries = len(self.structure.layers) + 1
        if layers is not None and not (isinstance(layers, int) and 1 <= layers <= entries):
            raise ValueError(f"layers: expected None or 1 to {entries} (hidden states of this model), got {layers}")
        tapped.warn_of_full_logits(self.structure)
        self.alpha, self.beta, self.seed, self.filter_tol = alpha, beta, seed, filter_tol
        self.mask, self.mask_padding, self.boundary = mask, mask_padding, boundary
        self.ignore_token_zero, self.norm_last_twice = ignore_token_zero, norm_last_twice
        self.layers, self.retain_weight, self.output_alpha = layers, retain_weight, output_alpha
        self.lens_transform, self.keep_logits_bytes = lens_transform, keep_logits_bytes
        self._needs_retain = False
        self.components: dict[str, Tensor] = {}
        self.evaluation: dict[str, Tensor] = {}
        self._last_noise: dict[str, Any] | None = None
        self.register_buffer("call", torch.zeros((), dtype=torch.int64))
        self._tapped = tapped.Tapped("RepNoiseLoss", model, self.structure, mlps=True, over_ranks=over_ranks)
        self._watch = guards.RoundingWatch("RepNoiseLoss")
        self._finalizer = weakref.finalize(self, _close, self._tapped.taps, self._watch)
        self._finalizer.atexit = False

    @classmethod
    def preset(cls, model: nn.Module, name: str, **changes: Any) -> RepNoiseLoss:
        """A loss with named settings, ``changes`` on top.

        ``published``: the published code. ``short_run``: output_alpha 5, retain_weight 1.5, mask_padding, boundary
        ``predicted``; what the demo uses, with 40 steps at lr 1.5e-4 on SmolLM2-135M-Instruct (docs/demo.md has
        what it bought and cost, and what other weights did). Training with it needs a ``retain`` batch, unless
        ``retain_weight`` 0 says that there is to be none.
        """
        if name not in PRESETS:
            raise ValueError(f"name: expected one of {', '.join(PRESETS)}, got {name!r}")
        loss = cls(model, **{**PRESETS[name], **changes})
        loss._needs_retain = "retain_weight" in PRESETS[name]
        return loss

    def forward(
        self,
        *,
        harmful: Mapping[str, Tensor],
        harmless: Mapping[str, Tensor],
        retain: Mapping[str, Tensor] | None = None,
        retain_weight: float | None = None,
        model: nn.Module | None = None,
        sample_offset: int | None = None,
    ) -> Tensor:
        """The loss of one paired batch, 0-dim, in fp32 (float64 for a float64 model).

        Args:
            harmful, harmless: ``input_ids`` [B, T], usually ``attention_mask`` [B, T], optionally ``labels`` and
                whatever else the model takes per sample; the same entries and shapes in both.
            retain: a batch of any shape on which plain cross-entropy is kept low: on ``labels`` where it has
                them (-100 ignored), else on every token that is not padding.
            retain_weight: for this call instead of the constructor's.
            model: the model as wrapped by DDP, FSDP or accelerate after construction; may be left out with one
                process, and where FSDP2 shards the model in place. With several processes and a model that is neither
                wrapped nor sharded, passing that bare model says that you average its gradients yourself.
            sample_offset: index of the first sample among all ranks' samples, from which the noise is drawn;
                by default that of the data ranks' batches in their order.

        Raises:
            ValueError: batches that do not fit each other, or none of whose tokens carries loss; model left out where
                the ranks would drift apart; a preset with a retain term, trained without a retain batch.
            FloatingPointError: a component is not finite; the message names it and its layer.
            RuntimeError: reentrant checkpointing, or taps that did not fire; head, norm, layers or MLPs were replaced
                after construction; the loss was closed.
        """
        weight = self.retain_weight if retain_weight is None else retain_weight
        guards.not_negative(retain_weight=weight)
        self._expect_retain(retain, weight)
        masks, bad, good = self._rows(harmful, harmless)
        aside = None if retain is None else (retain, tapped.next_tokens(retain, "retain"))
        good_in_pair = good._replace(rows=good.rows + harmful["input_ids"].numel())
        both = {k: torch.cat([harmful[k], harmless[k]]) for k in harmful}
        return self._terms(both, masks[0], bad, good_in_pair, aside, weight, model, sample_offset)

    def passes(
        self, *, harmful: Mapping[str, Tensor], harmless: Mapping[str, Tensor],
        retain: Mapping[str, Tensor] | None = None, micro: int, model: nn.Module | None = None,
    ) -> list[Callable[[], Tensor]]:  # fmt: skip
        """The loss of a call as a sum of several, each the result of a function that runs a forward of its own.

        They are run and differentiated in their order, so that the activations of one are there at a time: harmless and
        retain samples at most ``micro`` at a time, then the harmful half undivided, since its logarithm and its noise
        term see all samples. After the last, ``components`` are those of the call, and the counter has moved.

        Args and errors: as in a call.
        """
        self._expect_retain(retain, self.retain_weight)
        masks, bad, good = self._rows(harmful, harmless)
        ranks = data_ranks(self._tapped.model if model is None else model) if self._tapped.over_ranks else None
        marked = {**harmless, MASK: masks[1]}
        options = (self.boundary, self.ignore_token_zero)
        sides: list[tuple[str, Mapping[str, Tensor], Callable[[dict[str, Tensor]], Rows], Tensor, float]]
        sides = [
            ("harmless_ce", marked, lambda p: paired.surviving_rows(p["input_ids"], p[MASK], *options), good.total, 1.0)
        ]
        if retain is not None:
            count = tapped.carrying(retain, "retain").sum()
            sides.append(
                ("retain_ce", retain, lambda p: paired.plain_rows(p, "retain", some=False), count, self.retain_weight)
            )
        earlier: dict[str, Tensor] = {}

        def plain(name: str, batch: dict[str, Tensor], rows: Rows, total: Tensor, weight: float) -> Tensor:
            with self._tapped.call(model, self._lens) as call:
                read = {key: value for key, value in batch.items() if key != MASK}
                stats = call.read(read, OutputScope(call.lens, (rows.rows, rows.target))).stats
                assert stats is not None
                ce = self._total(stats.cross_entropy().sum(), rows)
                ce, number = totals(call.ranks, ce, total)
                earlier[name] = earlier.get(name, 0) + (ce / number).detach()
                return call.gated(weight * (ce / number) + call.zero.to(ce.dtype))

        found: list[Callable[[], Tensor]] = []
        for name, batch, rows_of, total, weight in sides:
            for piece in divided(batch, pieces(batch, micro, ranks)):
                found.append(partial(plain, name, piece, rows_of(piece), total, weight))
        none = Rows(good.rows[:0], good.target[:0], torch.zeros_like(good.boundary), torch.ones_like(good.total))
        return [
            *found,
            lambda: self._terms(dict(harmful), masks[0], bad, none, None, self.retain_weight, model, None, earlier),
        ]

    def _expect_retain(self, retain: Mapping[str, Tensor] | None, weight: float) -> None:
        if retain is None and self._needs_retain and weight and torch.is_grad_enabled():
            raise ValueError("retain: expected a batch, since this preset weighs one, got None; or set retain_weight=0")

    def _terms(
        self, pair: Mapping[str, Tensor], mask: Tensor, bad: Rows, good: Rows,
        aside: tuple[Mapping[str, Tensor], tuple[Tensor, Tensor]] | None, weight: float, model: nn.Module | None,
        sample_offset: int | None, earlier: Mapping[str, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """The loss of one forward, of both halves or of the harmful one, and of a retain batch's.

        mask [B, T]: the harmful half's. good: rows in ``pair``. aside: the retain batch and its rows. earlier:
        components that were differentiated before.
        """
        training = torch.is_grad_enabled()
        batch, length = mask.shape
        ranks = data_ranks(self._tapped.model if model is None else model)
        over = Gathered(mask, ranks) if self._tapped.over_ranks and training and several(ranks) else None
        before = batch * ranks.rank if over is None else over.before
        noise: dict[str, Any] = {
            "seed": self.seed,
            "call": self.call.to(mask.device, copy=True),
            "sample_offset": before if sample_offset is None else sample_offset,
        }

        def mmd_of(samples: Tensor, layer: int) -> Tensor:
            if over is not None:
                return over.mmd(samples, layer=layer, **noise)
            return gaussian_mmd(samples[None], mask, layer=layer, **noise)[0]

        layers = len(self.structure.layers)
        entries = self._drawn_entries()
        read = entries if self.norm_last_twice else entries - {layers}
        with self._tapped.call(model, self._lens) as call:
            assert call.lens is not None
            if training:
                self._watch(self.structure.model)
            scope = _PairScope(call.lens, batch, length, bad, good, read, layers, mmd_of)
            output, hidden, mmd = call.read(pair, scope)
            if not self.norm_last_twice and len(read) < len(entries):
                hidden[layers] = output[: bad.rows.shape[0]].sum()
            parts = self._combine(output, hidden, mmd, bad, good, call.ranks)
            if aside is not None:
                stats = call.read(aside[0], OutputScope(call.lens, aside[1])).stats
                assert stats is not None
                parts["retain_ce"] = mean(stats.cross_entropy(), call.ranks)
                parts["loss"] = parts["loss"] + weight * parts["retain_ce"]
            loss = parts["loss"] = parts["loss"] + call.zero.to(parts["loss"].dtype)
            if earlier is not None:
                parts |= earlier
                parts["loss"] = loss + earlier["harmless_ce"] + weight * earlier.get("retain_ce", 0)
            self._check_finite(parts, entries)
            figures = {name: value.detach() for name, value in parts.items()}
            assert call.lens.weight is not None
            wide = accumulation_dtype(call.lens.weight.dtype)
            self._last_noise = {**noise, "shape": (batch, length, call.lens.weight.shape[1]), "dtype": wide}
            if training:
                self.components = figures
                self.call += 1
            else:  # it moves nothing of the training's
                self.evaluation = figures
            return call.gated(loss)

    def check(
        self, *, harmful: Mapping[str, Tensor], harmless: Mapping[str, Tensor],
        retain: Mapping[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        """Raise the ValueError that a call would raise for batches that do not fit."""
        self._rows(harmful, harmless)
        if retain is not None:
            tapped.next_tokens(retain, "retain")

    def _rows(
        self, harmful: Mapping[str, Tensor], harmless: Mapping[str, Tensor]
    ) -> tuple[tuple[Tensor, Tensor], Rows, Rows]:
        """The token masks of the two halves, and the rows of each that carry loss."""
        paired.check_pair(harmful, harmless)
        masks = paired.token_masks(harmful, harmless, self.mask, self.mask_padding)
        options = (self.boundary, self.ignore_token_zero)
        bad = paired.surviving_rows(harmful["input_ids"], masks[0], *options)
        good = paired.surviving_rows(harmless["input_ids"], masks[1], *options)
        for name, rows in (("harmful", bad), ("harmless", good)):
            if int(rows.total) == 0:
                raise ValueError(
                    f"{name}: no token carries loss; expected at least one position t > 0 at which the mask "
                    f"({self.mask}{', padding left out' if self.mask_padding else ''}) is set"
                )
        return masks, bad, good

    def _lens(self) -> Lens:
        return Lens(
            self.structure, self.filter_tol, inner_transform=self.lens_transform == "model",
            keep_logits_bytes=self.keep_logits_bytes,
        )  # fmt: skip

    def _drawn_entries(self) -> frozenset[int]:
        """The hidden states that this step reads: all, or ``layers`` of them drawn from (seed, call)."""
        entries = range(len(self.structure.layers) + 1)
        if self.layers is None:
            return frozenset(entries)
        return frozenset(random.Random(f"{self.seed}:{int(self.call)}").sample(entries, self.layers))

    def _combine(
        self, output: Tensor, hidden: Mapping[int, Tensor], mmd: Mapping[int, Tensor], bad: Rows, good: Rows,
        ranks: DataRanks | None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """The loss and its components, from per-row cross-entropies of the output and sums of the hidden states."""
        entries = len(self.structure.layers) + 1
        split = bad.rows.shape[0]
        sums = [self._total(output[split:].sum(), good), self._total(output[:split].sum(), bad)]
        sums += [self._total(total, bad) for total in hidden.values()]
        *sums, good_total, bad_total = totals(ranks, *sums, good.total, bad.total)
        harmless_ce, output_ce = sums[0] / good_total, sums[1] / bad_total
        lens = {i: total / bad_total for i, total in zip(hidden, sums[2:], strict=True)}
        harmful = output_ce + torch.stack(list(lens.values())).sum() * (entries / len(lens))
        per_layer = torch.stack([mmd[i] for i in range(len(mmd))]).to(output.dtype)
        noise = per_layer.mean()
        missing = output_ce.new_full((), math.nan)
        loss = harmless_ce + self.beta * noise - self.alpha * torch.log(harmful / entries + 1)
        if self.output_alpha:
            loss = loss - self.output_alpha * torch.log1p(output_ce)
        return {
            "loss": loss,
            "harmless_ce": harmless_ce,
            "noise": noise,
            "noise_per_layer": per_layer,
            "harmful_ce": torch.stack([output_ce, *(lens.get(i, missing) for i in range(entries))]),
            "harmful_ce_output": output_ce,
            "harmful_ce_lens": torch.stack(list(lens.values())).mean(),
        }

    def _total(self, sums: Tensor, rows: Rows) -> Tensor:
        """Sums of cross-entropies over the rows that are read, with the labels that count as a constant."""
        return sums + rows.boundary.to(sums.dtype) * math.log(self.structure.vocabulary)

    def _check_finite(self, parts: Mapping[str, Tensor], entries: frozenset[int]) -> None:
        """Raise a FloatingPointError that names the first component, and its layer, that is not finite."""
        count = len(self.structure.layers) + 1
        values: dict[str, Tensor] = {"harmless_ce": parts["harmless_ce"]}
        values["harmful_ce of the model's output"] = parts["harmful_ce"][0]
        for i in (i for i in range(count) if i in entries):
            values[f"harmful_ce of hidden state {i} (of 0 to {count - 1})"] = parts["harmful_ce"][i + 1]
        for i, value in enumerate(parts["noise_per_layer"]):
            values[f"noise of layer {i} (of 0 to {count - 2})"] = value
        if "retain_ce" in parts:
            values["retain_ce"] = parts["retain_ce"]
        tapped.check_finite("RepNoiseLoss", {**values, "loss": parts["loss"]})

    def last_noise(self, layer: int) -> Tensor:
        """The noise of the last call at ``layer``, made again: standard normals [B, T, F], before the mask.

        Raises RuntimeError before the first call, IndexError for a layer that the model does not have.
        """
        if self._last_noise is None:
            raise RuntimeError("last_noise: there has been no call yet")
        if not 0 <= layer < len(self.structure.layers):
            raise IndexError(f"layer: expected 0 to {len(self.structure.layers) - 1}, got {layer}")
        options = dict(self._last_noise)
        batch, length, width = options.pop("shape")
        return gaussian_noise(batch, length * width, layer=layer, **options).view(batch, length, width)

    def close(self) -> None:
        """Remove the hooks from the model; the loss is of no use afterwards."""
        self._finalizer()


def _close(taps: Taps, watch: guards.RoundingWatch) -> None:
    taps.close()
    watch.close()
