"""Antidote (Huang et al. 2024, arXiv 2408.09600): prune, once, what harmful answers rest on in a fine-tuned model.

The score is Wanda's on harmful data, |W_ij| ||X_j||; in each output row the highest ones are set to 0. Where the model
was fine-tuned with LoRA, that is done to the factors, each a linear map of its own, and not to the weights beneath.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable

import torch
from torch import Tensor, nn

from fastguard.defenses.antidote.options import Options
from fastguard.methods.edit import Batches, Edit
from fastguard.methods.passes import Batch
from fastguard.methods.training import Figures, Role
from fastguard.ops.threshold_select import threshold_select
from fastguard.saliency.choose import weights_of
from fastguard.saliency.collect import Collect
from fastguard.saliency.prune import prune_
from fastguard.taps.anchor import full

FACTOR = "lora_"
"""In the name of a LoRA factor, as PEFT has it."""


class Antidote(Edit):
    """In each row of the weights the entries with the highest scores on harmful data become 0.

    Args:
        model: a fine-tuned causal language model, plain or PEFT. Its weights are changed IN PLACE; with LoRA on it,
            those of the factors alone.
        dense_ratio: share of each output row that goes: of I entries I - int(I (1 - dense_ratio)), as published.
        score: ``wanda``, |W_ij| sqrt(sum_t x_tj^2) over the tokens of all samples (published); ``snip``, |W| times the
            sum of samples' |dL/dW| (Wei et al. 2024; the published code's variant has the magnitude of the sum instead,
            and takes the highest of a whole matrix); ``magnitude``, |W| alone.
        modules: weights whose name has one of these in it; none: all linear maps of the layers, or all LoRA factors.
        samples: of harmful data, at most. tokens: ``all`` that are no padding, or those of the ``answer``.
        seed: unused; nothing is drawn.

    Raises ValueError for a model whose structure is not recognised.

    The published code takes the norms of a layer in a second forward that sees no pruned layer either; one is enough.
    """

    def __init__(
        self, model: nn.Module, *, dense_ratio: float = Options.dense_ratio, score: str = Options.score,
        modules: Iterable[str] = (), samples: int = Options.samples, tokens: str = Options.tokens, seed: int = 0,
    ) -> None:  # fmt: skip
        Options(dense_ratio, score, tuple(modules), samples, tokens)
        super().__init__(model, seed=seed)
        self.dense_ratio, self.score, self.modules, self.tokens = dense_ratio, score, tuple(modules), tokens
        self.roles = {"harmful": Role("harmful", count=samples)}

    def apply(self, data: Batches) -> Generator[Figures]:
        """One round. Figures: ``pruned``, how many entries, and ``pruned_share`` of the weights they are in.

        Raises ValueError where no weight has a name in ``modules``, and what `fastguard.saliency.Collect` raises.
        """
        masks, entries = self.masks(data["harmful"])
        pruned = prune_(self.model, masks)
        yield {"pruned": torch.tensor(float(pruned)), "pruned_share": torch.tensor(pruned / entries)}

    def masks(self, harmful: Iterable[Batch]) -> tuple[dict[str, Tensor], int]:
        """Bit-packed masks of what is to go, weight by weight, and how many entries these weights have."""
        factors = any(FACTOR in name for name, _ in self.model.named_parameters())

        def wanted(name: str) -> bool:
            return (FACTOR in name or not factors) and (not self.modules or any(part in name for part in self.modules))

        collect = Collect(self.model, "snip" if self.score == "snip" else "wanda", modules=wanted, tokens=self.tokens)
        try:
            collect.over(harmful)
            scores = collect.scores()
        finally:
            collect.close()
        read, masks, entries = weights_of(self.model), dict[str, Tensor](), 0
        for name in scores.names:
            weight = read(name)
            score, factor = scores.score(self.score, name, weight)
            columns = weight.shape[1]
            goes = columns - int(columns * (1 - self.dense_ratio))
            masks |= threshold_select(
                {name: full(score)}, goes, weights=None if factor is None else {name: factor}, per="row"
            ).masks
            entries += weight.numel()
        return masks, entries
