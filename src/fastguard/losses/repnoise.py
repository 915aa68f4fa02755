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
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastguard.losses import guards, paired, tapped
from fastguard.losses.language_model import OutputScope
from fastguard.losses.paired import Rows
from fastguard.machine import rank
from fastguard.ops.gaussian_mmd import gaussian_mmd
from fastguard.ops.philox import gaussian_noise
from fastguard.ops.precision import accumulation_dtype
from fastguard.taps import Lens, Taps, find_structure

LENS_TRANSFORMS = ("model", "none")

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
    """The concatenated forward: harmful samples first, harmless samples after them.

    Args:
        lens: the head. batch: samples of one half. harmful, harmless: their rows in the concatenation.
        entries: the hidden states to read. layers: how many MLPs there are. noise, mask: arguments of
            ``gaussian_mmd``.
    """

    output: Tensor | None
    hidden: dict[int, Tensor]
    mmd: dict[int, Tensor]

    def __init__(
        self, lens: Lens, batch: int, harmful: Rows, harmless: Rows, entries: frozenset[int],
        layers: int, noise: dict[str, Any], mask: Tensor,
    ) -> None:  # fmt: skip
        super().__init__()
        self.lens, self.batch, self.harmful, self.entries = lens, batch, harmful, entries
        self.layers, self.noise, self.mask = layers, noise, mask
        self.rows = torch.cat([harmful.rows, harmless.rows])
        self.target = torch.cat([harmful.target, harmless.target])
        self.end()

    def observe(self, kind: str, index: int, x: Tensor, keep: bool) -> None:
        """See `Scope.observe`: an MLP's output, a hidden state, or the final norm's output."""
        if kind == "mlp":
            samples = x.reshape(2 * self.batch, -1)[: self.batch]
            value = gaussian_mmd(samples[None], self.mask, layer=index, **self.noise)[0]
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
    ) -> None:
        super().__init__()
        for name, value, choices in (("mask", mask, paired.MASKS), ("boundary", boundary, paired.BOUNDARIES)):
            if value not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
        guards.a_filter_tol(filter_tol)
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
        self.lens_transform = lens_transform
        self._needs_retain = False
        self.components: dict[str, Tensor] = {}
        self.evaluation: dict[str, Tensor] = {}
        self._last_noise: dict[str, Any] | None = None
        self.register_buffer("call", torch.zeros((), dtype=torch.int64))
        self._tapped = tapped.Tapped("RepNoiseLoss", model, self.structure, mlps=True)
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
                by default rank * B.

        Raises:
            ValueError: batches that do not fit each other, or none of whose tokens carries loss; model left out where
                the ranks would drift apart; a preset with a retain term, trained without a retain batch.
            FloatingPointError: a component is not finite; the message names it and its layer.
            RuntimeError: reentrant checkpointing, or taps that did not fire; head, norm, layers or MLPs were replaced
                after construction; the loss was closed.
        """
        paired.check_pair(harmful, harmless)
        weight = self.retain_weight if retain_weight is None else retain_weight
        guards.not_negative(retain_weight=weight)
        training = torch.is_grad_enabled()
        if retain is None and self._needs_retain and weight and training:
            raise ValueError("retain: expected a batch, since this preset weighs one, got None; or set retain_weight=0")
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
        aside = None if retain is None else tapped.next_tokens(retain, "retain")
        batch, length = harmful["input_ids"].shape
        noise = {
            "seed": self.seed,
            "call": self.call.to(harmful["input_ids"].device, copy=True),
            "sample_offset": batch * rank() if sample_offset is None else sample_offset,
        }
        good_in_pair = good._replace(rows=good.rows + batch * length)
        layers = len(self.structure.layers)
        entries = self._drawn_entries()
        read = entries if self.norm_last_twice else entries - {layers}
        with self._tapped.call(model, self._lens) as call:
            assert call.lens is not None
            if training:
                self._watch(self.structure.model)
            scope = _PairScope(call.lens, batch, bad, good_in_pair, read, layers, noise, masks[0])
            output, hidden, mmd = call.read({k: torch.cat([harmful[k], harmless[k]]) for k in harmful}, scope)
            if not self.norm_last_twice and len(read) < len(entries):
                hidden[layers] = output[: bad.rows.shape[0]].sum()
            parts = self._combine(output, hidden, mmd, bad, good)
            if retain is not None:
                stats = call.read(retain, OutputScope(call.lens, aside)).stats
                assert stats is not None
                parts["retain_ce"] = stats.cross_entropy().mean()
                parts["loss"] = parts["loss"] + weight * parts["retain_ce"]
            parts["loss"] = parts["loss"] + call.zero.to(parts["loss"].dtype)
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
            return call.gated(parts["loss"])

    def _lens(self) -> Lens:
        return Lens(self.structure, self.filter_tol, inner_transform=self.lens_transform == "model")

    def _drawn_entries(self) -> frozenset[int]:
        """The hidden states that this step reads: all, or ``layers`` of them drawn from (seed, call)."""
        entries = range(len(self.structure.layers) + 1)
        if self.layers is None:
            return frozenset(entries)
        return frozenset(random.Random(f"{self.seed}:{int(self.call)}").sample(entries, self.layers))

    def _combine(
        self, output: Tensor, hidden: Mapping[int, Tensor], mmd: Mapping[int, Tensor], bad: Rows, good: Rows
    ) -> dict[str, Tensor]:
        """The loss and its components, from per-row cross-entropies of the output and sums of the hidden states."""
        log_v = math.log(self.structure.vocabulary)
        entries = len(self.structure.layers) + 1

        def mean(total: Tensor, rows: Rows) -> Tensor:
            return (total + rows.boundary.to(total.dtype) * log_v) / rows.total

        split = bad.rows.shape[0]
        harmless_ce, output_ce = mean(output[split:].sum(), good), mean(output[:split].sum(), bad)
        lens = {i: mean(total, bad) for i, total in hidden.items()}
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
