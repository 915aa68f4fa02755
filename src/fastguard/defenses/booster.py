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
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastguard.defenses.passes import Batch, Loss, differentiate, finite_norm, model_loss
from fastguard.losses.language_model import LanguageModelLoss
from fastguard.nested.gradients import added_gradients
from fastguard.nested.guard import derived_seed, own_random_numbers, rank
from fastguard.nested.linearised import linearised
from fastguard.nested.perturbation import Realised, perturbed
from fastguard.nested.snapshot import Where
from fastguard.nested.weights import Weights
from fastguard.ops.multi_tensor import accumulate_

MODES = ("weights", "linearised")


class Booster:
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
        seed: of the harmful passes' dropout, a function of (seed, step, rank).

    Raises:
        ValueError: an argument that does not fit, named.
    """

    def __init__(
        self,
        model: nn.Module,
        alpha: float = 0.1,
        lam: float = 5.0,
        eps: float = 1e-7,
        mode: str = "weights",
        *,
        snapshot: Where = "device",
        through: torch.dtype | None = None,
        allow_lost: bool = False,
        loss: Loss | None = None,
        seed: int = 0,
    ) -> None:
        if not alpha > 0:
            raise ValueError(f"alpha: expected a number above 0, got {alpha!r}")
        if not lam >= 0:
            raise ValueError(f"lam: expected a number >= 0, got {lam!r}")
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
        self.model, self.alpha, self.lam, self.eps, self.mode, self.seed = model, alpha, lam, eps, mode, seed
        self.snapshot, self.through, self.allow_lost = snapshot, through, allow_lost
        self.step = 0
        self._language = LanguageModelLoss(model, check_finite=False) if loss is None else None
        self.loss: Loss = loss or self._fused
        self.harmful_loss: Loss = model_loss if loss is None and mode == "linearised" else self.loss

    def _fused(self, model: nn.Module, batch: Batch) -> Tensor:
        assert self._language is not None
        return self._language(batch, model=model)

    def backward(
        self, *, harmful: Batch, harmless: Batch, model: nn.Module | None = None, scale: float = 1.0
    ) -> dict[str, Tensor]:
        """Add scale * gradient to every trainable parameter's.

        Args:
            harmful: prompts with harmful answers. harmless: the alignment batch, prompts with safe answers.
            model: as wrapped by DDP, FSDP2 or accelerate. scale: 1 / micro-batches of an optimizer step.

        Returns 0-dim ``loss`` (the objective), ``harmless``, ``harmful``, ``harmful_perturbed`` (losses),
        ``harmful_norm``, ``gradient_norm``, and where weights were written ``perturbation_cosine``,
        ``perturbation_ratio``.

        Whatever is raised, parameters, buffers, earlier gradients and the counter are as they were.

        Raises:
            FloatingPointError: a loss or gradient is not finite, or the harmful gradient is zero.
            PerturbationLostError: see ``mode``.
        """
        model = self.model if model is None else model
        figures: dict[str, Tensor] = {}
        with added_gradients(model) as weights:
            difference = self._difference(model, weights, harmful, figures)
            loss = self.loss(model, harmless)
            figures["harmless"] = differentiate(weights, loss, "Booster: harmless batch", scale)
            gradients = weights.take_gradients()
            _add(gradients, difference, scale * self.lam)
            figures["gradient_norm"] = finite_norm(weights, gradients, "Booster")
            weights.put_gradients(gradients)
        self.step += 1
        gain = figures["harmful"] - figures["harmful_perturbed"]
        return {"loss": figures["harmless"] + self.lam * gain, **figures}

    def _difference(
        self, model: nn.Module, weights: Weights, batch: Batch, figures: dict[str, Tensor]
    ) -> list[Tensor | None]:
        """g_h - grad h(w'), with no gradient left on the parameters: one accumulator, which is the direction before."""
        gradients = self._harmful(model, weights, batch, "harmful", figures)
        figures["harmful_norm"] = finite_norm(weights, gradients, "Booster: harmful batch")
        with self._perturbed(weights, gradients) as realised:
            after = self._harmful(model, weights, batch, "harmful_perturbed", figures)
        if realised is not None:
            figures["perturbation_cosine"] = torch.tensor(realised.cosine)
            figures["perturbation_ratio"] = torch.tensor(realised.ratio)
        _add(gradients, after, -1.0)
        return gradients

    def _harmful(
        self, model: nn.Module, weights: Weights, batch: Batch, name: str, figures: dict[str, Tensor]
    ) -> list[Tensor | None]:
        seed = derived_seed("booster", self.seed, self.step, rank())
        with own_random_numbers(seed, [p.device for p in weights.parameters]):
            loss = self.harmful_loss(model, batch)
            figures[name] = differentiate(weights, loss, f"Booster: {name.replace('_', ' ')} batch")
        return weights.take_gradients()

    def _perturbed(
        self, weights: Weights, directions: list[Tensor | None]
    ) -> contextlib.AbstractContextManager[Realised | None]:
        if self.mode == "linearised":
            return linearised(weights, directions, -self.alpha, eps=self.eps)
        return perturbed(
            weights, directions, -self.alpha, eps=self.eps, snapshot=self.snapshot, through=self.through,
            allow_lost=self.allow_lost,
        )  # fmt: skip

    def state_dict(self) -> dict[str, int]:
        """The counter, with which a new object goes on as this one would."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there."""
        self.step = int(state["step"])

    def close(self) -> None:
        """Take the hooks off the model."""
        if self._language is not None:
            self._language.close()


def _add(into: list[Tensor | None], gradients: Sequence[Tensor | None], weight: float) -> None:
    """into += weight * gradients, in place; a parameter without a gradient has a zero one."""
    both = [(a, g) for a, g in zip(into, gradients, strict=True) if a is not None and g is not None]
    accumulate_([a for a, _ in both], [g for _, g in both], weight)
    for i, g in enumerate(gradients):
        if into[i] is None and g is not None:
            into[i] = weight * g
