"""Delta-strip: take a defense's change out of the weights, then ablate refusal directions.

A defense that is trained into a public model, as a LoRA above all, is a difference between two checkpoints of which the
attacker has both. He takes the best part of low rank out of the difference of each matrix, which costs him no data and
no gradient, and deals with what is left as with any model: refusal directions, found afresh and cut out. A defense that
is low-rank is gone after the first round; what resists is of a rank above his, or in the base too.
"""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import nn

from fastguard.attacks.delta_strip.options import Options
from fastguard.attacks.delta_strip.strip import strip
from fastguard.attacks.refusal_ablation.step import RefusalAblation
from fastguard.methods.edit import Batches, Edit
from fastguard.methods.training import Figures


class DeltaStrip(Edit):
    """The change from a public base in the first round, one refusal direction in each that follows.

    Args:
        model: any Hugging Face causal language model in one process, adapters merged. Its weights are changed IN PLACE.
        base: the public model that it was made from: a folder, a Hugging Face id; in a run of fastguard's pipeline also
            the name of one of its models.
        rank: of the part of each matrix's change that is taken out; 0: the whole change, which gives the base.
        rounds: directions at most, after the first round. The other options are those of `RefusalAblation`.
        seed: of the randomised decomposition.

    Attributes:
        ablation: the `RefusalAblation` of the rounds that follow.

    Raises ValueError for a model whose structure is not recognised.
    """

    roles = RefusalAblation.roles

    def __init__(
        self, model: nn.Module, *, base: str = Options.base, rank: int = Options.rank, rounds: int = Options.rounds,
        positions: int = Options.positions, validation: int = Options.validation, estimation: int = Options.estimation,
        max_kl: float = Options.max_kl, min_steering: float = Options.min_steering, seed: int = 0,
    ) -> None:  # fmt: skip
        Options(rounds, positions, validation, estimation, max_kl, min_steering, base=base, rank=rank)
        super().__init__(model, seed=seed)
        self.base, self.rank = base, rank
        self.ablation = RefusalAblation(
            model, rounds=rounds, positions=positions, validation=validation, estimation=estimation, max_kl=max_kl,
            min_steering=min_steering, seed=seed,
        )  # fmt: skip
        self.rounds = 1 + rounds

    def apply(self, data: Batches) -> Generator[Figures]:
        """First ``changed`` (weights that differ from the base's) and ``share`` (of the change that is gone).

        Then what `RefusalAblation` gives. Raises what `strip` and `RefusalAblation` raise.
        """
        yield {name: torch.tensor(value) for name, value in strip(self.model, self.base, self.rank, self.seed).items()}
        yield from self.ablation.apply(data)

    def close(self) -> None:
        """End the ablation. The change stays out: it is in the weights."""
        self.ablation.close()
