"""Freezing of safety-critical weights (Wei et al. 2024, arXiv 2402.05162, section 4.4) while somebody fine-tunes.

What is frozen is what safety needs and utility does not: in each matrix the entries with the highest scores on
refusals that are not among the highest on ordinary answers. The paper's own finding is that this does not stop an
attacker: fine-tuning finds other weights.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable

import torch
from torch import Tensor, nn

from fastguard.defenses.safety_freezing.options import Options
from fastguard.methods.edit import Batches, Edit
from fastguard.methods.training import Figures, Role
from fastguard.saliency.choose import set_difference, weights_of
from fastguard.saliency.collect import Collect
from fastguard.saliency.freeze import Frozen
from fastguard.saliency.scores import Scores


class SafetyFreezing(Edit):
    """Entries that no torch optimizer moves from `apply` on until `close`: weight decay and momentum neither.

    Args:
        model: plain, DDP or FSDP2, of which all weights that are scored are trained.
        safety_top, utility_top: q and p, the shares of each matrix that are the highest on either data; frozen are the
            former without the latter (``fastguard.saliency.choose.set_difference``).
        score: ``snip`` or ``wanda``. modules: weights whose name has one of these in it; none: all linear maps.
        samples: of refusals and of ordinary answers, at most. seed: unused; nothing is drawn.

    Attributes:
        frozen: what holds the entries, between `apply` and `close`.
    """

    def __init__(
        self, model: nn.Module, *, safety_top: float = Options.safety_top, utility_top: float = Options.utility_top,
        score: str = Options.score, modules: Iterable[str] = (), samples: int = Options.samples, seed: int = 0,
    ) -> None:  # fmt: skip
        Options(safety_top, utility_top, score, tuple(modules), samples)
        super().__init__(model, seed=seed)
        self.safety_top, self.utility_top, self.score, self.modules = safety_top, utility_top, score, tuple(modules)
        self.roles = {"safety": Role("refusal", count=samples), "utility": Role("retain", count=samples)}
        self.frozen: Frozen | None = None

    def apply(self, data: Batches) -> Generator[Figures]:
        """Score, and freeze. Figures: ``frozen``, how many entries, and ``frozen_share`` of the weights they are in.

        Raises:
            ValueError: adapters are trained instead of the weights; a weight that is not trained, by its name; and what
                `fastguard.saliency.Collect` raises. RuntimeError: it was applied already.
        """
        if self.frozen is not None:
            raise RuntimeError("SafetyFreezing.apply: the weights are frozen already; close() lets them go")
        if any("lora_" in name for name, _ in self.model.named_parameters()):
            raise ValueError(
                "model: expected fine-tuning of the weights themselves, got LoRA adapters, whose product moves every "
                "entry of a weight at once: none of them can be frozen"
            )
        safety, utility = (self._scores(data[name]) for name in ("safety", "utility"))
        read = weights_of(self.model)
        masks = set_difference(safety, utility, read, self.safety_top, self.utility_top, score=self.score)
        self.frozen = Frozen(self.model, masks)
        count, entries = self.frozen.count, sum(read(name).numel() for name in masks)
        yield {"frozen": torch.tensor(float(count)), "frozen_share": torch.tensor(count / entries)}

    def _scores(self, batches: Iterable[dict[str, Tensor]]) -> Scores:
        collect = Collect(
            self.model, self.score, modules=lambda name: not self.modules or any(part in name for part in self.modules)
        )
        try:
            collect.over(batches)
            return collect.scores()
        finally:
            collect.close()

    def close(self) -> None:
        """Let them move again."""
        if self.frozen is not None:
            self.frozen.close()
            self.frozen = None
