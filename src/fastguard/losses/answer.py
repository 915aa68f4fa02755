"""Cross-entropy of the answers of a batch from the model's own logits: what a plain training loop computes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional as F

IGNORED = -100


def answer_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean cross-entropy over the answer tokens of a batch, in fp32; no logits before the first answer.

    batch: ``input_ids``, ``attention_mask`` and ``labels``, each [B, T], labels -100 outside the answers.
    """
    labels = batch["labels"][:, 1:]
    first = int((labels != IGNORED).any(0).nonzero()[0])
    out = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        logits_to_keep=batch["labels"].shape[1] - first,
    )
    rows = labels[:, first:] != IGNORED
    logits = out.logits[:, :-1][rows]
    return F.cross_entropy(logits.double() if logits.element_size() == 8 else logits.float(), labels[:, first:][rows])
