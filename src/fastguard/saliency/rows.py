"""Which rows of a batch are whose: those with gradients, those of the answers, those that predict them.

Shapes: B samples, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastguard.ops.segments import runs

Batch = Mapping[str, Tensor]


class Rows:
    """Which rows of a batch are whose: those with gradients, those of the answers, those that predict them."""

    def __init__(self, batch: Batch, tokens: str, counts: bool) -> None:
        if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
            raise ValueError(f"batch: expected a mapping with input_ids [B, T], got {type(batch).__name__}")
        ids = batch["input_ids"]
        if ids.dim() != 2 or not ids.numel():
            raise ValueError(f"batch: expected input_ids of shape [B, T], got {tuple(ids.shape)}")
        for name in ("attention_mask", "labels"):
            if name in batch and batch[name].shape != ids.shape:
                raise ValueError(
                    f"batch: expected {name} {tuple(ids.shape)} as input_ids, got {tuple(batch[name].shape)}"
                )
        self.ids, self.device, self.counts = ids, ids.device, counts
        attended = batch["attention_mask"] != 0 if "attention_mask" in batch else torch.ones_like(ids, dtype=torch.bool)
        self.labels = batch["labels"] if "labels" in batch else torch.where(attended, ids, -100)
        answer = self.labels != -100
        self.predicts = torch.cat([answer[:, 1:], torch.zeros_like(answer[:, :1])], 1)
        self.per_sample = self.predicts.sum(1)
        chosen = attended & answer if tokens == "answer" else attended
        attended = attended | self.predicts  # a masked token may predict: then it has a gradient
        if not counts:  # a forward for the other ranks' sake
            attended, chosen = torch.zeros_like(attended), torch.zeros_like(chosen)
        elif not bool(self.per_sample.any()):
            raise ValueError("batch: no token carries loss")
        self.attended, self.chosen = runs(attended), runs(chosen)
        self.samples = int((self.per_sample > 0).sum()) if counts else 0
        self.answers = int(self.per_sample.sum()) if counts else 0
        self.inputs = int(chosen.sum())

    def of(self, x: Tensor, name: str, gradient: bool = True) -> tuple[Tensor, Tensor | None]:
        """Bounds and compaction (see ``segments.runs``) of the rows of an activation [B, T, ...] or [B T, ...]."""
        samples, tokens = self.ids.shape
        if x.shape[:-1] in ((samples, tokens), (samples * tokens,)):
            return self.attended if gradient else self.chosen
        if gradient and x.dim() == 3 and x.shape[0] == samples and x.shape[1] < tokens:  # a head at the last positions
            return runs(
                self.predicts[:, -x.shape[1] :] if self.counts else torch.zeros_like(x[..., 0], dtype=torch.bool)
            )
        raise RuntimeError(
            f"saliency: {name} runs on rows {list(x.shape[:-1])}, expected the batch's {samples} x {tokens} tokens; "
            "leave it out with modules= (the expert of a mixture sees rows of which nobody says whose they are)"
        )
