"""Which rows of a paired batch carry loss.

A paired batch is one prompt with two answers: harmful [B, T] and harmless [B, T]. A token mask m [B, T] says
where they differ; position t of a sequence predicts token t + 1, so its label survives where m[t + 1] is set.
Rows are indices into the flattened [B * T] positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from fastguard.losses import guards, tapped

MASKS = ("difference", "labels")
BOUNDARIES = ("constant", "predicted")


class Rows(NamedTuple):
    """The rows of one half that carry loss.

    rows, target: [N] int64, what is read through the head. boundary: how many more labels contribute the
    constant log V (0-dim int64). total: labels in the mean, boundary included (0-dim int64).
    """

    rows: Tensor
    target: Tensor
    boundary: Tensor
    total: Tensor


def check_pair(harmful: Mapping[str, Tensor], harmless: Mapping[str, Tensor]) -> None:
    """Raise a ValueError unless the two batches have the same tensors in the same shapes."""
    for name, batch in (("harmful", harmful), ("harmless", harmless)):
        guards.a_batch(batch, name)
        ids = batch.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            given = "none" if ids is None else f"{type(ids).__name__} {tuple(getattr(ids, 'shape', ()))}"
            raise ValueError(f"{name}: expected input_ids of shape [B, T], got {given}")
    ids = harmful["input_ids"]
    if harmless["input_ids"].shape != ids.shape:
        raise ValueError(
            f"harmless: expected input_ids of the shape of harmful {tuple(ids.shape)}, got "
            f"{tuple(harmless['input_ids'].shape)}; pad the pair to one length (fastguard.PairedCollator)"
        )
    if set(harmful) != set(harmless):
        raise ValueError(f"harmless: expected the entries of harmful {sorted(harmful)}, got {sorted(harmless)}")
    for name, batch in (("harmful", harmful), ("harmless", harmless)):
        for key, value in batch.items():
            if not isinstance(value, Tensor) or value.shape[:1] != ids.shape[:1]:
                shape = tuple(getattr(value, "shape", ()))
                raise ValueError(f"{name}[{key!r}]: expected a tensor of {ids.shape[0]} samples, got shape {shape}")


def token_masks(
    harmful: Mapping[str, Tensor], harmless: Mapping[str, Tensor], mask: str, mask_padding: bool
) -> tuple[Tensor, Tensor]:
    """The token masks [B, T] (bool) of the two halves.

    mask: ``difference`` (tokens at which the two sequences differ) or ``labels`` (``labels`` other than -100).
    mask_padding: also leave out what the attention mask calls padding.
    """
    if mask == "labels":
        if "labels" not in harmful:
            raise ValueError("mask: 'labels' needs an entry 'labels' in harmful and harmless")
        masks = harmful["labels"] != -100, harmless["labels"] != -100
    else:
        differ = harmful["input_ids"] != harmless["input_ids"]
        masks = differ, differ
    if mask_padding:
        if "attention_mask" not in harmful:
            raise ValueError("mask_padding: needs an entry 'attention_mask' in harmful and harmless")
        masks = masks[0] & (harmful["attention_mask"] != 0), masks[1] & (harmless["attention_mask"] != 0)
    return masks


def plain_rows(batch: Mapping[str, Tensor], name: str, some: bool = True) -> Rows:
    """The rows of a plain batch that carry loss; see ``tapped.next_tokens``."""
    rows, target = tapped.next_tokens(batch, name, some)
    return Rows(rows, target, rows.new_zeros(()), rows.new_full((), len(rows)))


def surviving_rows(ids: Tensor, mask: Tensor, boundary: str, ignore_token_zero: bool) -> Rows:
    """The rows of ids [B, T] that carry loss under the token mask [B, T].

    boundary: ``constant`` zeroes the logits of positions whose own token is masked out, as the published code
    does, so that the label they predict counts as log V; ``predicted`` lets them predict it.
    """
    length = ids.shape[1]
    survives = mask[:, 1:]
    if ignore_token_zero:
        survives = survives & (ids[:, 1:] != 0)
    read = survives & mask[:, :-1] if boundary == "constant" else survives
    where = read.nonzero()
    total = survives.sum()
    return Rows(where[:, 0] * length + where[:, 1], ids[:, 1:][read], total - where.shape[0], total)
