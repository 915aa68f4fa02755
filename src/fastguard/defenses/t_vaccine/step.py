"""T-Vaccine (Liu et al. 2024): Vaccine on a few attention blocks at a time, the more harmful ones more often.

8 blocks, drawn every 20 steps without replacement, with probabilities in proportion to ||g_l|| of one harmful sample,
which is measured every 200 steps. Published: rho 3, LoRA on all linear maps, lr 1e-3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fastguard.defenses.t_vaccine.options import Options
from fastguard.defenses.vaccine.step import Vaccine
from fastguard.methods.passes import Batch, Loss
from fastguard.methods.training import Figures, Role, Step
from fastguard.nested.guard import derived_seed
from fastguard.nested.weights import Select
from fastguard.over_ranks import summed
from fastguard.ranks import data_ranks


class TVaccine(Vaccine):
    """`Vaccine` on a few blocks at a time, the more harmful ones more often.

    Step t (counted in calls of `backward`) measures anew if t is a multiple of ``probe_every``, and draws anew if it
    is one of ``every``; the draw is a function of (seed, t) and of the measured norms.

    Args:
        model, rho, eps, allow_lost, loss, micro: as in `Vaccine`; published rho 3.
        layers: blocks that are perturbed at a time. every, probe_every: steps between draws and between measurements.
        trains: ``published``: the code freezes the attention of the layers that were not drawn, and trains the MLPs of
            all layers; but below the lowest layer drawn its reentrant checkpoints leave nothing a gradient, unless the
            embedding is trained: there its adapters rest, here too; ``drawn``: nothing in
            the layers that were not drawn, the paper's purpose: it spares their weights' products and ends the backward
            at the lowest layer drawn, unless something below the layers is trained; ``all``: everything. A parameter
            that is not trained keeps the gradient it has, None after ``zero_grad``, and optimizers skip it.
        seed: of the draws.

    Attributes:
        probabilities: of the layers, at the last measurement. drawn: the blocks that are perturbed now, ascending.
    """

    roles: Mapping[str, Role] = {"harmless": Role("safe"), "harmful": Role("harmful", count=1, optional=True)}

    def __init__(
        self,
        model: nn.Module,
        rho: float = Options.rho,
        layers: int = Options.layers,
        every: int = Options.every,
        probe_every: int = Options.probe_every,
        eps: float = 1e-7,
        *,
        trains: str = Options.trains,
        allow_lost: bool = False,
        loss: Loss | None = None,
        micro: int | None = None,
        seed: int = 0,
    ) -> None:
        Options(rho=rho, layers=layers, every=every, probe_every=probe_every, trains=trains)
        super().__init__(model, rho, eps, allow_lost=allow_lost, loss=loss, micro=micro, seed=seed)
        count = len(self.structure.attentions)
        if not 1 <= layers <= count:
            self.close()
            raise ValueError(f"layers: expected 1 to {count}, the model's layers, got {layers!r}")
        self.layers, self.every, self.probe_every, self.trains = layers, every, probe_every, trains
        self.probabilities: list[float] = []
        self.drawn: list[int] = []

    def checked(self, batches: Mapping[str, Any]) -> dict[str, Any]:
        """See `Training.checked`."""
        found = super().checked(batches)
        if self.step % self.probe_every == 0 and found.get("harmful") is None:
            raise ValueError(f"harmful: step {self.step} measures the layers on a harmful sample, got None")
        return found

    def prepare(self, model: nn.Module, *, harmless: Batch, harmful: Batch | None = None) -> Select:  # type: ignore[override]
        """Where the step measures, read the first sample of ``harmful``; where it draws, draw."""
        if self.step % self.probe_every == 0:
            assert harmful is not None
            self.probabilities = self._measure(harmful)
        if self.step % self.every == 0:
            self.drawn = self._draw()
        return self._trained()

    def gradient(self, step: Step, *, harmless: Batch, harmful: Batch | None = None) -> Figures:  # type: ignore[override]
        """As `Vaccine.gradient`, on the blocks that are drawn."""
        return self._update(step, harmless, self.drawn)

    def _measure(self, harmful: Batch) -> list[float]:
        """Probabilities in proportion to the norms of the gradient at each block, of the first data rank's sample."""
        sample = {k: v[:1] for k, v in harmful.items()}
        self.perturbation.record(lambda: self.loss(self.model, sample))
        norms = torch.stack([self.perturbation.norms[i] for i in range(len(self.structure.attentions))]).double()
        ranks = data_ranks(self.model)
        norms = summed(norms if ranks.rank == 0 else torch.zeros_like(norms), ranks)
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
        attention, layers = self.structure.attentions, self.structure.layers
        parts = attention if self.trains == "published" else layers
        resting = {id(p) for i, part in enumerate(parts) if i not in self.drawn for p in part.parameters()}
        if self.trains == "published" and not self._embedding_trained():
            resting |= {id(p) for layer in layers[: self.drawn[0]] for p in layer.parameters()}
        return [p for p in self.structure.model.parameters() if p.requires_grad and id(p) not in resting]

    def _embedding_trained(self) -> bool:
        """Whether a gradient reaches below the layers: reentrant checkpoints then let it pass through all of them."""
        embedding = self.structure.model.get_input_embeddings()  # type: ignore[operator]
        return any(p.requires_grad for p in embedding.parameters())

    def state_dict(self) -> dict[str, Any]:
        """See `Vaccine.state_dict`: the counter, what was last measured and what was last drawn."""
        return {"step": self.step, "probabilities": list(self.probabilities), "drawn": list(self.drawn)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Vaccine.load_state_dict`."""
        super().load_state_dict(state)
        self.probabilities, self.drawn = list(state["probabilities"]), list(state["drawn"])
