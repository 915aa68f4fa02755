"""SEAM (Wang et al. 2025, arXiv 2505.12186): learning the harmful answers is made to unlearn the harmless ones.

    L = L_ul + alpha L_up + beta cos(g_a, g_b)

g_a is the gradient of the cross-entropy of harmful answers, g_b that of ordinary ones: where they oppose each other, a
step that learns harm costs the model its use. L_up is the cross-entropy of refusals, L_ul = -log(h / (L + 1) + 1) with
h the sum of the harmful cross-entropies of the output and of all L + 1 hidden states, as in Representation Noising.

With unit vectors u_a, u_b and c = cos, exactly,

    grad cos = H_a (u_b - c u_a) / |g_a| + H_b (u_a - c u_b) / |g_b|

with the Hessians of the two losses. The published code puts [g(w + eps d) - g(w)] / eps for H d and writes w + eps d
into bf16 weights. A step of norm 1e-3 over billions of them moves one weight in some thousands, and the noise of that
is multiplied by beta / eps = 10. Here ``product`` says how H d is had:

* ``tangent``: exact (``nested.hessian_product``), with nothing that cancels, so also right in bf16. Its passes make the
  logits of the rows' positions, and it takes plain attention, no shards, no replicas;
* ``linearised``: the published difference without rounding of weights (``nested.linearised``): still a difference,
  whose error is of the order of eps, and in bf16 the rounding of two passes over eps;
* ``difference``: the published difference, weights written and put back bit for bit. Right in fp32, for LoRA in fp32
  and from fp32 masters, and what FSDP2 and DDP take. What the dtype kept of the step is measured, and a step that it
  lost is refused.

Cost: 5 forwards and 6 backwards (published 6 and 6): one harmful forward serves L_ul and g_a, which it cannot where the
model is wrapped or for ``linearised``. Of the tangents' two forwards and backwards each costs two to three. Memory
above a training step: g_a, g_b, one accumulator and a direction, each of the gradients' size (and the snapshot of
``difference``).

Both passes of a batch draw the same dropout; the published code draws it anew.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fastguard.defenses.seam.options import Options
from fastguard.losses import paired
from fastguard.losses.paired import Rows
from fastguard.methods.passes import Batch
from fastguard.methods.training import Figures, Role, Step, Training, add
from fastguard.nested.guard import on_every_rank
from fastguard.nested.linearised import linearised
from fastguard.nested.perturbation import Realised, perturbed
from fastguard.nested.snapshot import Where
from fastguard.nested.tangent import hessian_product
from fastguard.nested.weights import Weights
from fastguard.over_ranks import totals
from fastguard.ranks import DataRanks
from fastguard.taps import Lens

Gradients = list[Tensor | None]


class _Text(NamedTuple):
    """A batch, and the rows of it that carry loss."""

    name: str
    batch: Batch
    rows: Rows


class SEAM(Training):
    """Gradients of one SEAM step; the caller owns the optimizer.

        seam = SEAM(model)                                  # before compilation, DDP and FSDP2
        figures = seam.backward(harmful=..., harmless=..., benign=..., model=wrapped)
        optimizer.step(); optimizer.zero_grad()

    Args:
        model: a Hugging Face causal language model, plain or PEFT.
        alpha, beta: of the refusals and of the cosine. eps: length of the steps of ``linearised`` and ``difference``.
        product: ``tangent``, ``linearised`` or ``difference``; see the module.
        mask_padding, boundary: of the pair's loss, as for ``RepNoiseLoss``.
        filter_tol: of the inner hidden states, as for ``lm_head_stats``; the output is exact.
        snapshot, through, allow_lost: of ``difference``, as for ``Booster``.
        seed: of dropout, a function of (seed, step, data rank).

    Raises:
        ValueError: an argument that does not fit, named.
    """

    roles: ClassVar[dict[str, Role]] = {"pair": Role("pair"), "benign": Role("retain")}  # type: ignore[misc]

    def __init__(
        self,
        model: nn.Module,
        alpha: float = Options.alpha,
        beta: float = Options.beta,
        eps: float = Options.eps,
        product: str = Options.product,
        *,
        mask_padding: bool = Options.mask_padding,
        boundary: str = Options.boundary,
        filter_tol: float | None = None,
        snapshot: Where = "device",
        through: torch.dtype | None = None,
        allow_lost: bool = False,
        seed: int = 0,
    ) -> None:
        Options(alpha=alpha, beta=beta, eps=eps, product=product, mask_padding=mask_padding, boundary=boundary)
        super().__init__(model, seed=seed)
        self.alpha, self.beta, self.eps, self.product = alpha, beta, eps, product
        self.mask_padding, self.boundary, self.filter_tol = mask_padding, boundary, filter_tol
        self.snapshot, self.through, self.allow_lost = snapshot, through, allow_lost

    def gradient(  # type: ignore[override]
        self, step: Step, *, harmful: Batch, harmless: Batch, benign: Batch
    ) -> Figures:
        """One step.

        Args:
            harmful, harmless: the same prompts with harmful answers and with refusals, in one shape, as
                ``RepNoiseLoss`` takes them. benign: ordinary instructions with answers, of any shape.

        Returns ``loss``, ``unlearning`` (L_ul), ``harmless_ce`` (L_up), ``cosine``, ``harmful_ce``, ``lens_ce`` (the
        mean over hidden states), ``benign_ce``, ``harmful_norm``, ``benign_norm``, ``gradient_norm``, and for
        ``difference`` ``perturbation_cosine`` and ``perturbation_ratio``, of the worse of its two steps.

        Raises:
            ValueError: batches that do not fit; a model that cannot have the ``product``.
            FloatingPointError: a loss or gradient is not finite, or g_a or g_b is zero.
            PerturbationLostError: ``difference`` in a dtype that cannot hold its steps.
        """
        bad, good = self._pair(harmful, harmless)
        plain = _Text("benign", benign, paired.plain_rows(benign, "benign"))
        figures: Figures = {}
        a = self._harmful(step, bad, figures)
        good_ce = self._fused(step.model, good)[1]
        figures["harmless_ce"] = step.differentiate(good_ce, "harmless batch", step.scale * self.alpha)
        total = step.take()
        b = self._gradient(step, plain, figures)
        figures["harmful_norm"], figures["benign_norm"] = step.norm(a, "harmful batch"), step.norm(b, "benign batch")
        norms = float(figures["harmful_norm"]), float(figures["benign_norm"])
        if not all(norms):
            raise FloatingPointError(f"SEAM: the norms of the harmful and the benign gradient are {norms}; one is zero")
        figures["cosine"] = _dot(step.weights, a, b) / (norms[0] * norms[1])
        cosine = float(figures["cosine"])
        steps: list[Realised] = []
        for text, own, other, norm, other_norm in ((bad, a, b, *norms), (plain, b, a, *norms[::-1])):
            direction: Gradients = [None if g is None else g / other_norm for g in other]
            add(direction, own, -cosine / norm)
            self._add_product(step, total, text, own, direction, step.scale * self.beta / norm, steps)
        figures["gradient_norm"] = step.put(total)
        if steps:
            figures["perturbation_cosine"] = torch.tensor(min(s.cosine for s in steps))
            figures["perturbation_ratio"] = torch.tensor(max((s.ratio for s in steps), key=lambda r: abs(r - 1)))
        loss = figures["unlearning"] + self.alpha * figures["harmless_ce"] + self.beta * figures["cosine"]
        return {"loss": loss, **figures}

    def inspect(self, *, harmful: Batch, harmless: Batch, benign: Batch) -> None:  # type: ignore[override]
        """See `Training.inspect`."""
        self._pair(harmful, harmless)
        paired.plain_rows(benign, "benign")

    def _pair(self, harmful: Batch, harmless: Batch) -> tuple[_Text, _Text]:
        """The harmful answers and the refusals, with the rows at which they differ."""
        paired.check_pair(harmful, harmless)
        masks = paired.token_masks(harmful, harmless, "difference", self.mask_padding)
        texts = []
        for name, batch, mask in (("harmful", harmful, masks[0]), ("harmless", harmless, masks[1])):
            rows = paired.surviving_rows(batch["input_ids"], mask, self.boundary, True)
            if rows.rows.shape[0] == 0:
                raise ValueError(f"{name}: no token carries loss; expected answers that differ in two tokens on end")
            texts.append(_Text(name, batch, rows))
        return texts[0], texts[1]

    def _harmful(self, step: Step, bad: _Text, figures: Figures) -> Gradients:
        """g_a; the gradient of L_ul stays on the parameters."""
        # A wrapper's hooks expect one backward a forward, and a difference wants both its ends computed alike.
        apart = step.weights.sharded or step.weights.replicated or self.product == "linearised"
        found = self._gradient(step, bad, figures) if apart else None
        with step.random("seam", bad.name):
            inner, output = self._fused(step.model, bad, states=True)
        if found is None:
            figures["harmful_ce"] = step.differentiate(output, "harmful batch", 1.0, again=True)
            found = step.take()
        figures["lens_ce"] = inner.detach().mean()
        unlearning = -torch.log((inner.sum() + output) / len(inner) + 1)
        figures["unlearning"] = step.differentiate(unlearning, "harmful batch, all hidden states")
        return found

    def _gradient(self, step: Step, text: _Text, figures: Figures | None = None) -> Gradients:
        """Of the cross-entropy of the output; none is left on the parameters."""
        with step.random("seam", text.name):
            loss = self._own(step, text) if self.product == "linearised" else self._fused(step.model, text)[1]
            value = step.differentiate(loss, f"{text.name} batch", 1.0)
        if figures is not None:
            figures[f"{text.name}_ce"] = value
        return step.take()

    def _add_product(
        self, step: Step, total: Gradients, text: _Text, own: Gradients, direction: Gradients, weight: float,
        steps: list[Realised],
    ) -> None:  # fmt: skip
        """total += weight * H direction, with the Hessian of the text's cross-entropy and ``own`` its gradient."""
        if self.product == "tangent":
            with step.random("seam", text.name):
                value, product = hessian_product(step.weights, direction, lambda: self._own(step, text))
            if not on_every_rank(torch.isfinite(value)):
                raise FloatingPointError(f"SEAM: {text.name} batch: the loss of the tangent pass is {float(value)}")
            add(total, product, weight)
            return
        length = float(step.norm(direction, f"{text.name} batch, the other gradient less its part along this one"))
        if length == 0:  # the gradients are parallel, and the cosine has no slope
            return
        with self._moved(step.weights, direction, self.eps * length) as realised:
            there = self._gradient(step, text)
        add(there, own, -1.0)  # before anything is scaled: they differ by little
        add(total, there, weight / self.eps)
        if realised is not None:
            steps.append(realised)

    def _moved(
        self, weights: Weights, direction: Gradients, norm: float
    ) -> contextlib.AbstractContextManager[Realised | None]:
        if self.product == "linearised":
            return linearised(weights, direction, norm, eps=0.0)
        return perturbed(
            weights, direction, norm, eps=0.0, snapshot=self.snapshot, through=self.through, allow_lost=self.allow_lost
        )

    def _fused(self, model: nn.Module, text: _Text, states: bool = False) -> tuple[Tensor, Tensor]:
        """Cross-entropies without logits: of all hidden states [L + 1], or none [0], and of the output, 0-dim."""
        structure, (rows, target) = self.language.structure, text.rows[:2]
        last = len(structure.layers)
        with self.language.tapped.call(model, lambda: Lens(structure, self.filter_tol)) as call:
            lens = call.lens
            assert lens is not None

            def statistic(index: int, x: Tensor, keep: bool) -> Tensor:
                read = [False] * states + [True] * (index == last)
                found = [lens.cross_entropy(x, rows, target, normed=normed, keep=keep).sum() for normed in read]
                return torch.stack(found) if found else x.new_zeros(0)

            sums = call.numbers(text.batch, statistic)
            inner = torch.cat([*sums[:last], sums[last][:-1]])
            return tuple(self._mean(total, text.rows, call.ranks) for total in (inner, sums[last][-1]))  # type: ignore[return-value]

    def _own(self, step: Step, text: _Text) -> Tensor:
        """The cross-entropy of the output from the model's own logits, of the positions from the first that is read."""
        length, rows = text.batch["input_ids"].shape[1], text.rows.rows
        options: dict[str, Any] = {}
        if "use_cache" in self.language.structure.arguments:
            options["use_cache"] = False
        if "logits_to_keep" in self.language.structure.arguments:
            options["logits_to_keep"] = length - int((rows % length).min())
        out = step.model(**{k: v for k, v in text.batch.items() if k != "labels"}, **options)
        logits = out.logits if hasattr(out, "logits") else out[0]
        first = length - logits.shape[1]
        logits = logits[rows // length, rows % length - first]
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return self._mean(nn.functional.cross_entropy(wide, text.rows.target, reduction="sum"), text.rows, step.ranks)

    def _mean(self, total: Tensor, rows: Rows, ranks: DataRanks | None) -> Tensor:
        boundary = rows.boundary.to(total.dtype) * math.log(self.language.structure.vocabulary)
        sums, count = totals(ranks, total + boundary, rows.total)
        return sums / count


def _dot(weights: Weights, a: Gradients, b: Gradients) -> Tensor:
    """The inner product over all parameters that have both, and over all shards."""
    both = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x is not None and y is not None]
    if not both:
        return torch.zeros(())
    some = Weights(weights.model, [weights.parameters[i] for i in both])
    return some.dot([a[i] for i in both], [b[i] for i in both])  # type: ignore[misc]
