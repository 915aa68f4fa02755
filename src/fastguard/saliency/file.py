"""Tensors written into one safetensors file in the memory of one of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastguard.edits.shards import DTYPES, Stored, header
from fastguard.machine import rank, sync_folder
from fastguard.taps.anchor import full

_NAMES = {dtype: name for name, dtype in DTYPES.items()} | {torch.uint8: "U8"}


def write_tensors(file: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Write ``tensors`` under their names; the file appears whole or not at all.

    Sharded tensors are gathered one at a time: every rank calls this, and the first one writes.
    """
    stored, end = [], 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        stored.append((name, Stored(name, _NAMES[tensor.dtype], tuple(tensor.shape), end, size)))
        end += size
    first = rank() == 0
    partial = file.with_name(file.name + ".partial")
    if first:
        file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(partial if first else os.devnull, "wb") as out:
            out.write(header(stored, dict(about)))
            for tensor in tensors.values():
                whole = full(tensor)
                if first:
                    out.write(whole.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
            if first:
                out.flush()
                os.fsync(out.fileno())
        if first:
            os.replace(partial, file)
            sync_folder(file.parent)
    finally:
        if first:
            partial.unlink(missing_ok=True)
