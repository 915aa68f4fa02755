"""Vaccine (Huang et al. 2024, arXiv 2402.01109) and T-Vaccine (Liu et al. 2024): embeddings that resist a drift.

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

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastguard.defenses.passes import Batch, Loss, differentiate, finite_norm
from fastguard.losses.language_model import LanguageModelLoss
from fastguard.nested.activations import ActivationPerturbation
from fastguard.nested.gradients import added_gradients
from fastguard.nested.guard import derived_seed
from fastguard.taps import find_structure

TRAINS = ("published", "drawn", "all")


class Vaccine:
    """Gradients of one Vaccine step; the caller owns the optimizer.

        vaccine = Vaccine(model)                            # before compilation, DDP and FSDP2
        figures = vaccine.backward(harmless=..., model=wrapped)
        optimizer.step(); optimizer.zero_grad()

    Args:
        model: a causal language model, plain or PEFT.
        rho: 2-norm of the perturbation over all blocks, samples and tokens of this rank. eps: beside the norm.
        allow_lost: go on where most of the perturbation was rounded away.
        loss: (model, batch) -> 0-dim loss; None is the cross-entropy of ``LanguageModelLoss``.

    Raises:
        ValueError: an argument that does not fit, named; a model whose attention blocks are not found.
    """

    def __init__(
        self, model: nn.Module, rho: float = 2.0, eps: float = 1e-7, *, allow_lost: bool = False,
        loss: Loss | None = None,
    ) -> None:  # fmt: skip
        structure = find_structure(model)
        if not structure.attentions:
            raise ValueError(f"model: no attention blocks are found in {type(structure.model).__name__}")
        self.model, self.structure, self.allow_lost = model, structure, allow_lost
        self.perturbation = ActivationPerturbation(structure.model, structure.attentions, rho, eps)
        self._language = LanguageModelLoss(model, structure=structure, check_finite=False) if loss is None else None
        self.loss: Loss = loss or self._fused
        self.step = 0

    def _fused(self, model: nn.Module, batch: Batch) -> Tensor:
        assert self._language is not None
        return self._language(batch, model=model)

    def backward(
        self, *, harmless: Batch, harmful: Batch | None = None, model: nn.Module | None = None, scale: float = 1.0
    ) -> dict[str, Tensor]:
        """Add scale * gradient to the trainable parameters'.

        Args:
            harmless: the alignment batch, prompts with safe answers. harmful: not used; T-Vaccine needs it.
            model: as wrapped by DDP, FSDP2 or accelerate. scale: 1 / micro-batches of an optimizer step.

        Returns 0-dim ``loss`` (perturbed), ``gradient_norm``, ``perturbation_cosine`` and ``perturbation_ratio``.

        Whatever is raised, parameters, buffers, earlier gradients and the counter are as they were.

        Raises:
            FloatingPointError: the loss or a gradient is not finite, or the gradient at the blocks is zero.
            PerturbationLostError: the activations' dtype has rounded the perturbation away.
        """
        model = self.model if model is None else model
        figures = self._update(model, harmless, None, None, scale)
        self.step += 1
        return figures

    def _update(
        self, model: nn.Module, batch: Batch, blocks: Sequence[int] | None, only: Sequence[nn.Parameter] | None,
        scale: float,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Record, perturb ``blocks`` and differentiate; None for all blocks, and for all parameters in ``only``."""
        with added_gradients(model, only) as weights:
            shifts = self.perturbation.record(lambda: self.loss(self.model, batch), blocks)
            with self.perturbation.applied(shifts) as applied:
                loss = applied.bound(self.loss(model, batch))
            realised = applied.realised()
            realised.judge(type(self).__name__, "Compute the attention blocks in fp32", self.allow_lost)
            some = () if weights.sharded or weights.replicated else weights.parameters
            value = differentiate(weights, loss, type(self).__name__, scale, some)
            gradients = weights.take_gradients()
            norm = finite_norm(weights, gradients, type(self).__name__)
            weights.put_gradients(gradients)
        return {
            "loss": value, "gradient_norm": norm, "perturbation_cosine": torch.tensor(realised.cosine),
            "perturbation_ratio": torch.tensor(realised.ratio),
        }  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """What a new object needs to go on as this one would."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.step = int(state["step"])

    def close(self) -> None:
        """Take the hooks off the model."""
        self.perturbation.close()
        if self._language is not None:
            self._language.close()


class TVaccine(Vaccine):
    """`Vaccine` on a few blocks at a time, the more harmful ones more often.

    Step t (counted in calls of `backward`) measures anew if t is a multiple of ``probe_every``, and draws anew if it
    is one of ``every``; the draw is a function of (seed, t) and of the measured norms.

    Args:
        model, rho, eps, allow_lost, loss: as in `Vaccine`; published rho 3.
        layers: blocks that are perturbed at a time. every, probe_every: steps between draws and between measurements.
        trains: ``published``: the code freezes the attention of the layers that were not drawn, and trains everything
            else, the MLPs of all layers included, so that the backward still passes all layers; ``drawn``: nothing in
            the layers that were not drawn, the paper's purpose: it spares their weights' products and ends the backward
            at the lowest layer drawn, unless something below the layers is trained; ``all``: everything. A parameter
            that is not trained keeps the gradient it has, None after ``zero_grad``, and optimizers skip it.
        seed: of the draws.

    Attributes:
        probabilities: of the layers, at the last measurement. drawn: the blocks that are perturbed now, ascending.
    """

    def __init__(
        self,
        model: nn.Module,
        rho: float = 3.0,
        layers: int = 8,
        every: int = 20,
        probe_every: int = 200,
        eps: float = 1e-7,
        *,
        trains: str = "published",
        allow_lost: bool = False,
        loss: Loss | None = None,
        seed: int = 0,
    ) -> None:
        for name, value in (("every", every), ("probe_every", probe_every)):
            if value < 1:
                raise ValueError(f"{name}: expected 1 or more steps, got {value!r}")
        if trains not in TRAINS:
            raise ValueError(f"trains: expected one of {', '.join(TRAINS)}, got {trains!r}")
        super().__init__(model, rho, eps, allow_lost=allow_lost, loss=loss)
        count = len(self.structure.attentions)
        if not 1 <= layers <= count:
            self.close()
            raise ValueError(f"layers: expected 1 to {count}, the model's layers, got {layers!r}")
        self.layers, self.every, self.probe_every, self.trains, self.seed = layers, every, probe_every, trains, seed
        self.probabilities: list[float] = []
        self.drawn: list[int] = []

    def backward(
        self, *, harmless: Batch, harmful: Batch | None = None, model: nn.Module | None = None, scale: float = 1.0
    ) -> dict[str, Tensor]:
        """As `Vaccine.backward`; where the step measures, the first sample of ``harmful`` is read."""
        model = self.model if model is None else model
        before = self.state_dict()
        try:
            if self.step % self.probe_every == 0:
                if harmful is None:
                    raise ValueError(f"harmful: step {self.step} measures the layers on a harmful sample, got None")
                self.probabilities = self._measure(harmful)
            if self.step % self.every == 0:
                self.drawn = self._draw()
            figures = self._update(model, harmless, self.drawn, self._trained(), scale)
        except BaseException:
            self.load_state_dict(before)
            raise
        self.step += 1
        return figures

    def _measure(self, harmful: Batch) -> list[float]:
        """Probabilities in proportion to the norms of the gradient at each block, the mean over ranks."""
        sample = {k: v[:1] for k, v in harmful.items()}
        self.perturbation.record(lambda: self.loss(self.model, sample))
        norms = torch.stack([self.perturbation.norms[i] for i in range(len(self.structure.attentions))]).double()
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(norms)
        found: list[float] = (norms / norms.sum()).tolist()
        return found

    def _draw(self) -> list[int]:
        generator = torch.Generator().manual_seed(derived_seed("t-vaccine", self.seed, self.step))
        p = torch.tensor(self.probabilities, dtype=torch.float64).clamp_min(1e-30)  # so that enough have one
        drawn: list[int] = torch.multinomial(p, self.layers, generator=generator).sort().values.tolist()
        return drawn

    def _trained(self) -> list[nn.Parameter] | None:
        """The parameters that learn in this step; None for all."""
        if self.trains == "all":
            return None
        parts = self.structure.attentions if self.trains == "published" else self.structure.layers
        resting = {id(p) for i, part in enumerate(parts) if i not in self.drawn for p in part.parameters()}
        return [p for p in self.structure.model.parameters() if p.requires_grad and id(p) not in resting]

    def state_dict(self) -> dict[str, Any]:
        """See `Vaccine.state_dict`: the counter, what was last measured and what was last drawn."""
        return {"step": self.step, "probabilities": list(self.probabilities), "drawn": list(self.drawn)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Vaccine.load_state_dict`."""
        super().load_state_dict(state)
        self.probabilities, self.drawn = list(state["probabilities"]), list(state["drawn"])
