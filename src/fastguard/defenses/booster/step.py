"""Booster (Huang et al. 2024, arXiv 2409.01586): alignment that a step towards harm gains little from.

Objective f(w) + lambda (h(w) - h(w')), f the alignment loss, h the harmful loss, w' one normalised step down h:

    g_h = grad h(w),   w' = w - alpha g_h / (||g_h|| + 1e-7),   gradient = grad f(w) + lambda (g_h - grad h(w'))

with ||.|| over all trainable parameters and w' a constant (first order). Published: alpha 0.1, lambda 5, LoRA, 20
epochs; three forwards and backwards a step, as here.

Where this differs from the published code:

* w is restored bit for bit; the code adds the step back.
* the step must be real. The code's in-place step is rounded away in bf16. Here its realised cosine and length are
  measured (``figures``), with a warning where a twentieth is lost, and an error where a third is; see ``mode``.
* both harmful passes draw the same dropout. With masks of their own, g_h - grad h(w') would mostly be their difference.

Memory above a training step's: one accumulator of the gradients' size, and the snapshot (none from masters or for
``linearised``); under gradient accumulation also the earlier micro-batches' gradient, which a failing step must not
touch.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastguard.defenses.booster.options import Options
from fastguard.methods.passes import Batch, Loss, model_loss
from fastguard.methods.training import Figures, Role, Step, Training, add
from fastguard.nested.linearised import linearised
from fastguard.nested.perturbation import Realised, perturbed
from fastguard.nested.snapshot import Where
from fastguard.nested.weights import Weights

LONG = 0.1
"""Share of the harmful loss by which a step should not move it."""


class Booster(Training):
    """Gradients of one Booster step; the caller owns the optimizer.

        booster = Booster(model)                            # before compilation, DDP and FSDP2
        figures = booster.backward(harmful=..., harmless=..., model=wrapped)
        optimizer.step(); optimizer.zero_grad()

    Args:
        model: a causal language model, plain or PEFT; all parameters that require a gradient are perturbed and trained.
        alpha: length of the harmful step. lam: lambda. eps: beside the norm.
        mode: ``weights`` writes w' in place of w: right for fp32 parameters, LoRA adapters in fp32, and bf16 parameters
            with fp32 masters. ``linearised`` writes nothing and adds each module's product with the direction to its
            output (``nested.linearised``): right for bf16 without masters, where all modules are affine in their
            parameters and nothing is sharded; its harmful passes make the model's own logits.
        snapshot: where w waits (``nested.Snapshot``): ``device``, ``host``, a budget in bytes, or fp32 masters in the
            order of ``nested.Weights(model)``.
        through: the dtype in which the forward sees the weights, where it is not theirs.
        allow_lost: go on where most of the step was rounded away.
        loss: (model, batch) -> 0-dim loss, for all passes; None is the cross-entropy of ``LanguageModelLoss``.
        micro: samples that pass through the model at a time, at most; see ``methods.training.Training``.
        seed: of the harmful passes' dropout, a function of (seed, step, data rank).

    Raises:
        ValueError: an argument that does not fit, named.
    """

    roles: ClassVar[dict[str, Role]] = {"harmful": Role("harmful"), "harmless": Role("safe")}  # type: ignore[misc]

    def __init__(
        self,
        model: nn.Module,
        alpha: float = Options.alpha,
        lam: float = Options.lam,
        eps: float = 1e-7,
        mode: str = Options.mode,
        *,
        snapshot: Where = "device",
        through: torch.dtype | None = None,
        allow_lost: bool = False,
        loss: Loss | None = None,
        micro: int | None = None,
        seed: int = 0,
    ) -> None:
        Options(alpha=alpha, lam=lam, mode=mode)
        super().__init__(model, loss=loss, seed=seed, micro=micro)
        self.alpha, self.lam, self.eps, self.mode = alpha, lam, eps, mode
        self.snapshot, self.through, self.allow_lost = snapshot, through, allow_lost
        self._warned = False
        self.own_logits = loss is None and mode == "linearised"

    def gradient(self, step: Step, *, harmful: Batch, harmless: Batch) -> Figures:  # type: ignore[override]
        """One step.

        Args:
            harmful: prompts with harmful answers. harmless: the alignment batch, prompts with safe answers.

        Returns ``loss`` (the objective; the published code logs the alignment loss, here ``harmless``),
        ``harmless``, ``harmful``, ``harmful_perturbed`` (losses), ``harmful_norm``,
        ``gradient_norm``, and where weights were written ``perturbation_cosine``, ``perturbation_ratio``.

        Raises:
            FloatingPointError: a loss or gradient is not finite, or the harmful gradient is zero.
            PerturbationLostError: see ``mode``.
        """
        figures: Figures = {}
        difference = self._difference(step, harmful, figures)
        figures["harmless"] = step.differentiate(step.passes(step.loss, harmless), "harmless batch")
        gradients = step.take()
        add(gradients, difference, step.scale * self.lam)
        figures["gradient_norm"] = step.put(gradients)
        gain = figures["harmful"] - figures["harmful_perturbed"]
        if not self._warned:  # asks the device
            self._warn_of_a_long_step(float(gain), float(figures["harmful"]))
        return {"loss": figures["harmless"] + self.lam * gain, **figures}

    def _warn_of_a_long_step(self, gain: float, loss: float) -> None:
        """g_h - grad h(w') is a second-order quantity; after a long step it is mostly lambda g_h: it teaches harm."""
        if not gain > LONG * loss:
            return
        self._warned = True
        warnings.warn(
            f"alpha: the step of length {self.alpha:g} moves the harmful loss by {gain / loss:.0%}, from {loss:.3g} to "
            f"{loss - gain:.3g}; beyond {LONG:.0%} Booster's gradient is mostly descent on the harmful answers, and "
            "the model learns to comply. Published alphas are for LoRA; over all weights one is expected that moves it "
            "by a few percent",
            stacklevel=5,
        )

    def _difference(self, step: Step, batch: Batch, figures: Figures) -> list[Tensor | None]:
        """g_h - grad h(w'), with no gradient left on the parameters: one accumulator, which is the direction before."""
        gradients = self._harmful(step, batch, "harmful", figures)
        figures["harmful_norm"] = step.norm(gradients, "harmful batch")
        with self._perturbed(step.weights, gradients) as realised:
            after = self._harmful(step, batch, "harmful_perturbed", figures)
        if realised is not None:
            figures["perturbation_cosine"] = torch.tensor(realised.cosine)
            figures["perturbation_ratio"] = torch.tensor(realised.ratio)
        add(gradients, after, -1.0)
        return gradients

    def _harmful(self, step: Step, batch: Batch, name: str, figures: Figures) -> list[Tensor | None]:
        with step.random("booster"):
            loss = (lambda piece: step.mean(model_loss(step.model, piece), piece)) if self.own_logits else step.loss
            figures[name] = step.differentiate(step.passes(loss, batch), f"{name.replace('_', ' ')} batch", 1.0)
        return step.take()

    def _perturbed(
        self, weights: Weights, directions: list[Tensor | None]
    ) -> contextlib.AbstractContextManager[Realised | None]:
        if self.mode == "linearised":
            return linearised(weights, directions, -self.alpha, eps=self.eps)
        return perturbed(
            weights, directions, -self.alpha, eps=self.eps, snapshot=self.snapshot, through=self.through,
            allow_lost=self.allow_lost,
        )  # fmt: skip
