"""What the passes of methods have in common: which loss, and that it is finite on every rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fastguard.losses.tapped import NOTHING, carrying, next_tokens
from fastguard.nested.guard import on_every_rank
from fastguard.nested.weights import Weights

Batch = Mapping[str, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The mean cross-entropy of the tokens that carry loss (``LanguageModelLoss``), from the model's own logits."""
    rows, target = next_tokens(batch, "batch")
    output = model(**{k: v for k, v in batch.items() if k != "labels"})
    logits = (output.logits if hasattr(output, "logits") else output[0]).flatten(0, 1)[rows]
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return nn.functional.cross_entropy(wide, target)


def tokens(batch: Batch) -> Tensor | int:
    """How many tokens of a batch carry loss, 0-dim; 1 for a batch of another form, which only a caller's loss knows."""
    return carrying(batch, "batch").sum() if "input_ids" in batch else 1


def attended(batch: Batch, mask_padding: bool) -> Tensor | None:
    """[B, T] bool: where a batch is no padding; None where padding counts, or nobody says what it is."""
    return batch["attention_mask"].bool() if mask_padding and "attention_mask" in batch else None


def positions(batch: Batch, mask: Tensor | None = None) -> Tensor | int:
    """How many tokens a batch has where ``mask`` is true, 0-dim; without one padding too."""
    return batch["input_ids"].numel() if mask is None else mask.sum()


def inspect(batches: Mapping[str, Batch]) -> None:
    """Raise a ValueError that names a batch of which no token carries loss; one wait for the device."""
    counts = {name: carrying(batch, name).sum() for name, batch in batches.items() if "input_ids" in batch}
    for name, count in zip(counts, torch.stack(list(counts.values())).tolist() if counts else [], strict=True):
        if count == 0:
            raise ValueError(f"{name}: {NOTHING}")


def differentiate(
    weights: Weights, loss: Tensor, name: str, scale: float = 1.0, only: Sequence[Tensor] = (), again: bool = False
) -> Tensor:
    """Backward of scale * loss; returns the loss, detached.

    only: the parameters whose gradients are wanted, where the model is neither sharded nor replicated.
    again: the graph stays for another backward; on such a model too.
    Raises FloatingPointError, on every rank alike, where the loss is not finite.
    """
    if loss.dim() != 0:
        raise ValueError(f"loss: expected a 0-dim tensor, got shape {tuple(loss.shape)}")
    value = loss.detach()
    if not on_every_rank(torch.isfinite(value)):
        raise FloatingPointError(f"{name}: the loss is {float(value)} (on this rank)")
    (scale * loss).backward(inputs=list(only) or None, retain_graph=again)
    weights.prepare()
    return value


def finite_norm(weights: Weights, gradients: Sequence[Tensor | None], name: str) -> Tensor:
    """The 2-norm of gradients, one a parameter, over all shards; FloatingPointError where it is not finite."""
    given = [i for i, g in enumerate(gradients) if g is not None]
    some = weights.subset(given)
    norm = some.norm([g for g in gradients if g is not None])
    if not on_every_rank(torch.isfinite(norm)):
        raise FloatingPointError(f"{name}: the gradient's norm is {float(norm)}")
    return norm
