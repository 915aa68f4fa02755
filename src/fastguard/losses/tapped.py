"""What every loss with taps does around them: run the model, name the rows that carry loss, refuse NaN."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastguard.losses import guards
from fastguard.taps import Structure


def warn_of_full_logits(structure: Structure, stacklevel: int = 3) -> None:
    """Warn where the model cannot be told to make no [B, T, V] logits."""
    if "logits_to_keep" not in structure.arguments:
        warnings.warn(
            f"{type(structure.model).__name__}.forward has no logits_to_keep: each call makes its full logits",
            stacklevel=stacklevel,
        )


def run(structure: Structure, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """One forward; returns what the loss must add for a wrapper's backward: 0 * (what logits it made), or nothing.

    FSDP2 and DDP hang their backward on the model's output. Elsewhere the term would cost a [V, D] gradient of zeros.
    """
    options: dict[str, Any] = {}
    if "logits_to_keep" in structure.arguments:
        options["logits_to_keep"] = 1
    if "use_cache" in structure.arguments:
        options["use_cache"] = False
    out = model(**{k: v for k, v in batch.items() if k != "labels"}, **options)
    logits: Tensor = out.logits if hasattr(out, "logits") else out[0]
    return 0 * logits.sum() if _wrapped(structure, model) else logits.new_zeros(())


def _wrapped(structure: Structure, model: nn.Module) -> bool:
    """Whether anything but PEFT or torch.compile stands around the language model, or shards it in place."""
    if any(hasattr(module, "unshard") for module in model.modules()):
        return True
    return model is not structure.model and not (hasattr(model, "peft_config") or hasattr(model, "_orig_mod"))


def next_tokens(batch: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """Rows into the flattened positions of a plain batch and the tokens they predict.

    The tokens are the ``labels`` other than -100, else those that the attention mask keeps, else all.
    Raises a ValueError that calls the batch ``name``.
    """
    guards.a_batch(batch, name)
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise ValueError(f"{name}: expected input_ids of shape [B, T]")
    if "labels" in batch:
        label, counts = batch["labels"], batch["labels"] != -100
    else:
        label, counts = ids, batch["attention_mask"] != 0 if "attention_mask" in batch else ids >= 0
    where = counts[:, 1:].nonzero()
    if where.shape[0] == 0:
        raise ValueError(f"{name}: no token carries loss")
    return where[:, 0] * ids.shape[1] + where[:, 1], label[:, 1:][counts[:, 1:]]


def silent_taps(loss: str) -> RuntimeError:
    """The error of a forward in which the taps of ``loss`` did not fire."""
    return RuntimeError(
        f"{loss}: the forward did not pass its taps. Construct the loss before the first call of a compiled "
        "model, and let model= be a wrapper of the model that the loss was constructed with, not a copy of it"
    )


def check_finite(loss: str, values: Mapping[str, Tensor]) -> None:
    """Raise a FloatingPointError that names the first of the 0-dim ``values`` that is not finite; one copy to host."""
    wide = list(values.values())[-1].dtype
    given = torch.stack([value.detach().to(wide) for value in values.values()]).tolist()
    for name, value in zip(values, given, strict=True):
        if not math.isfinite(value):
            raise FloatingPointError(f"{loss}: {name} is {value}")
