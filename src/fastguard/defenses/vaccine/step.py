"""Vaccine (Huang et al. 2024, arXiv 2402.01109): embeddings that resist a drift. T-Vaccine builds on it.

    e_l = rho g_l / (||g|| + 1e-7),   gradient = grad f(w; the output of attention block l shifted by e_l)

f the alignment loss, g_l its gradient at that output, ||g|| over all blocks, e_l a constant. Vaccine: rho 2, every
block. T-Vaccine: rho 3 on 8 blocks, drawn every 20 steps without replacement, with probabilities in proportion to
||g_l|| of one harmful sample, which is measured every 200 steps. Both: LoRA on all linear maps, lr 1e-3.

Cost: two forwards and two backwards; the first backward computes no weight's gradient and ends at the lowest perturbed
block, and its forward keeps no activations for weights. (The published code computes and drops all gradients.)
Memory above a training step's: the shifts, B x T x D a perturbed block.

bf16 activations keep a shift below their spacing only in the mean over entries; ``figures`` say how much is there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from fastguard.defenses.vaccine.options import Options
from fastguard.methods.passes import Batch, Loss
from fastguard.methods.training import Figures, Role, Step, Training
from fastguard.nested.activations import ActivationPerturbation, realised_of
from fastguard.over_ranks import summed
from fastguard.taps import find_structure


class Vaccine(Training):
    """Gradients of one Vaccine step; the caller owns the optimizer.

        vaccine = Vaccine(model)                            # before compilation, DDP and FSDP2
        figures = vaccine.backward(harmless=..., model=wrapped)
        optimizer.step(); optimizer.zero_grad()

    Args:
        model: a causal language model, plain or PEFT.
        rho: 2-norm of the perturbation over all blocks, samples and tokens. eps: beside the norm.
        allow_lost: go on where most of the perturbation was rounded away.
        loss: (model, batch) -> 0-dim loss; None is the cross-entropy of ``LanguageModelLoss``.
        micro: samples that pass through the model at a time, at most; see ``methods.training.Training``.

    Raises:
        ValueError: an argument that does not fit, named; a model whose attention blocks are not found.
    """

    roles: Mapping[str, Role] = {"harmless": Role("safe"), "harmful": Role("harmful", optional=True)}

    def __init__(
        self, model: nn.Module, rho: float = Options.rho, eps: float = 1e-7, *, allow_lost: bool = False,
        loss: Loss | None = None, micro: int | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        structure = find_structure(model)
        if not structure.attentions:
            raise ValueError(f"model: no attention blocks are found in {type(structure.model).__name__}")
        Options(rho=rho)
        super().__init__(model, loss=loss, seed=seed, structure=structure, micro=micro)
        self.structure, self.allow_lost = structure, allow_lost
        self.perturbation = ActivationPerturbation(structure.model, structure.attentions, rho, eps)

    def gradient(self, step: Step, *, harmless: Batch, harmful: Batch | None = None) -> Figures:  # type: ignore[override]
        """One step.

        Args:
            harmless: the alignment batch, prompts with safe answers. harmful: not used; T-Vaccine needs it.

        Returns ``loss`` (perturbed), ``gradient_norm``, ``perturbation_cosine`` and ``perturbation_ratio``.

        Raises:
            FloatingPointError: the loss or a gradient is not finite, or the gradient at the blocks is zero.
            PerturbationLostError: the activations' dtype has rounded the perturbation away.
        """
        return self._update(step, harmless, None)

    def _update(self, step: Step, batch: Batch, blocks: Sequence[int] | None) -> Figures:
        """Record, perturb ``blocks`` (None: all) and differentiate."""
        weights = step.weights
        pieces = step.pieces(batch)

        def share_of_loss(piece: Batch, share: float) -> Tensor:
            return share * step.loss(piece, self.model)

        shifts = self.perturbation.record_all([partial(share_of_loss, *piece) for piece in pieces], blocks, step.ranks)
        sums: list[Tensor] = []

        def perturbed(piece: Batch, own: dict[int, Tensor]) -> Tensor:
            with self.perturbation.applied(own) as applied:
                loss = applied.bound(step.loss(piece))
            sums.append(applied.sums())
            return loss

        passes = [(partial(perturbed, piece, own), share) for (piece, share), own in zip(pieces, shifts, strict=True)]
        some = () if weights.sharded or weights.replicated else weights.parameters
        value = step.differentiate(passes, "", only=some)
        realised = realised_of(summed(torch.stack(sums).sum(0), step.ranks))
        realised.judge(type(self).__name__, "Compute the attention blocks in fp32", self.allow_lost)
        norm = step.put(step.take())
        return {
            "loss": value, "gradient_norm": norm, "perturbation_cosine": torch.tensor(realised.cosine),
            "perturbation_ratio": torch.tensor(realised.ratio),
        }  # fmt: skip

    def close(self) -> None:
        """See `Training.close`."""
        self.perturbation.close()
        super().close()
