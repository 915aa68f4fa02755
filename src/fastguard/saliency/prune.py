"""Weights set to 0, or to what another model has there: in a model, or in its files shard by shard."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastguard.edits.shards import Folder
from fastguard.edits.stream import Edit
from fastguard.ops.masks import apply_mask_, pack_mask, unpack_mask
from fastguard.saliency.freeze import shard_of
from fastguard.saliency.places import clean
from fastguard.saliency.sums import local
from fastguard.taps.structure import unwrap

VERSION = 1
"""Of the arithmetic: shards of another are done again."""


@torch.no_grad()
def prune_(model: nn.Module, masks: Mapping[str, Tensor], base: Mapping[str, Tensor] | None = None) -> int:
    """Set the entries of ``model``'s weights that ``masks`` choose to 0, or to those of ``base``, IN PLACE.

    Args:
        model: plain, PEFT, DDP, FSDP2.
        masks: weight -> bit-packed mask over the whole weight (``fastguard.pack_mask``).
        base: weight -> the whole weight of another model (Wei et al.'s ``recover_from_base``).

    Returns how many entries were set. Raises ValueError that names a weight that the model or ``base`` has not; nothing
    is changed then.
    """
    named = {clean(name): p for name, p in unwrap(model).named_parameters()}
    for name in masks:
        if name not in named:
            raise ValueError(f"masks: {name}: there is no such parameter in the model")
        if base is not None and (name not in base or base[name].shape != named[name].shape):
            raise ValueError(f"base: {name}: expected {tuple(named[name].shape)}, got none or another shape")
    count = 0
    for name, packed in masks.items():
        weight = named[name]
        whole = unpack_mask(packed, weight.shape).to(weight.device)
        count += int(whole.sum())
        value = None
        if base is not None:
            value = shard_of(base[name].to(weight.device, weight.dtype), weight).contiguous()
        apply_mask_(local(weight.detach()), pack_mask(shard_of(whole, weight)), value)
    return count


def pruning(
    source: Folder, masks: Mapping[str, Tensor], base: Folder | None = None, origin: Mapping[str, Any] | None = None
) -> Edit:
    """`prune_` as an `Edit` of the files in ``source``, in the memory of one tensor.

    origin: how the masks came about, for the record.
    Raises ValueError that names a weight that ``source`` or ``base`` has not.
    """
    there = source.tensors
    digest = hashlib.sha256()
    tensors: dict[str, Callable[[Tensor], object]] = {}
    others = None if base is None else base.tensors
    for name, packed in masks.items():
        if name not in there:
            raise ValueError(f"masks: {name}: there is no such tensor in {source.path}")
        if others is not None and (name not in others or others[name].shape != there[name].shape):
            raise ValueError(f"base: {name}: expected {there[name].shape} in {base and base.path}")
        digest.update(name.encode() + packed.cpu().numpy().tobytes())
        tensors[name] = partial(_set, base, name, packed)
    options = {
        "masks_sha256": digest.hexdigest(), "base": None if base is None else str(base.path), "version": VERSION,
        "origin": dict(origin or {}),
    }  # fmt: skip
    return Edit("pruning", options, tensors)


def _set(base: Folder | None, name: str, packed: Tensor, tensor: Tensor) -> None:
    apply_mask_(tensor, packed, None if base is None else base.read(name).to(tensor.dtype))
