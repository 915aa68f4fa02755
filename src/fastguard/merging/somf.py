"""SOMF (arXiv 2405.09055): the safe model, and of what each task changed that part which a mask keeps.

With delta_t = W_t - W_safe (of adapters: of each factor by itself, not of their product) and one mask m for all tasks,

    W = W_safe + coefficient sum_t delta_t m / mean(m),    the mean over the tensor.

The mask's logits are learned on safety data (`SubspaceMask`). What m is of them when models are merged:

=========== =========================================================================================================
probability sigmoid(logits)
binary      1 or 0, one draw of that probability: as published. A relaxed Bernoulli variable exceeds 1/2 with the
            probability of the Bernoulli one, at any temperature; the draw is a function of seed, tensor and place
threshold   1 where the probability exceeds 1/2, else 0
=========== =========================================================================================================

A tensor without logits gets m = 1: plain task arithmetic, to which by the mean any equal probabilities come as well,
those of the initial logits 0 (1/2) among them. Of a tensor from whose mask nothing is left (mean 0) the safe model's
weights are written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastguard.edits.shards import DTYPES, Shard, as_tensor, read_bytes
from fastguard.merging import arithmetic
from fastguard.merging.drop import keep

Factor = Callable[[int, int], Tensor]
"""(how many, the first one's place) -> m / mean(m), float64."""


def rescaled(logits: Tensor, export: str, seed: int, name: str) -> Factor:
    """m / mean(m) of a tensor, made again for each portion; all zeros where the mean is 0.

    Args:
        logits: the mask's, of the tensor's shape. export: as in the table above. seed, name: of the draw.

    Raises:
        ValueError: logits that are not finite.
    """
    flat = logits.reshape(-1)

    def mask(count: int, at: int) -> Tensor:
        probability = flat[at : at + count].double().sigmoid()
        if export == "binary":
            return keep(len(probability), at, probability, seed=seed, tensor=name, model=0).double()
        return (probability > 0.5).double() if export == "threshold" else probability

    total = 0.0
    for at in range(0, flat.numel(), arithmetic.PORTION):
        if not flat[at : at + arithmetic.PORTION].isfinite().all():
            raise ValueError(f"masks: expected finite logits for {name}")
        total += float(mask(arithmetic.PORTION, at).sum())
    factor = flat.numel() / total if total else 0.0
    return lambda count, at: mask(count, at).mul_(factor)


def fused(coefficient: float, factor: Factor | None) -> arithmetic.Portion:
    """W_0 + coefficient sum_t (W_t - W_0) m / mean(m); m = 1 without a factor."""

    def merge(parts: list[Tensor], at: int) -> Tensor:
        base, *others = parts
        change = torch.zeros_like(base)
        for other in others:
            change.add_(other - base)
        return moved(base, change, at, coefficient, factor)

    return merge


def moved(base: Tensor, change: Tensor, at: int, coefficient: float, factor: Factor | None) -> Tensor:
    """A portion of the safe weights, and of all tasks' changes together."""
    if factor is not None:
        change = change * factor(len(base), at).to(change.dtype)
    return base.add(change, alpha=coefficient)


@dataclass(frozen=True)
class Logits:
    """A file of masks' logits, read tensor by tensor. ``called``: its name and SHA-256, for the record."""

    shard: Shard
    called: str

    @classmethod
    def open(cls, file: str | Path, shapes: Mapping[str, tuple[int, ...]], out: Path) -> Logits:
        """Held against the tensors that are merged, by name; some may be without logits.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no safetensors file, holds nothing or logits of a tensor that is not merged, or of another
                shape or no floating-point dtype; ``out`` holds it.
        """
        path = Path(file)
        if not path.is_file():
            raise FileNotFoundError(f"masks: there is no file {str(file)!r}")
        if out.resolve() in path.resolve().parents:
            raise ValueError(f"out: {str(out)!r} holds {str(file)!r}, which is read")
        try:
            shard = Shard.open(path)
        except ValueError as error:
            raise ValueError(f"masks: {str(error).removeprefix('model: ')}") from None
        if not shard.tensors:
            raise ValueError(f"masks: expected logits by tensor in {str(file)!r}, got none")
        for t in shard.tensors:
            if shapes.get(t.name) != t.shape or t.dtype not in DTYPES:
                expected = f"{list(shapes[t.name])}" if t.name in shapes else "tensors of the model alone"
                raise ValueError(
                    f"masks: expected {expected} in floating point, got {t.name!r} {list(t.shape)} {t.dtype} in "
                    f"{str(file)!r}"
                )
        with open(path, "rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        return cls(shard, f"{path.name}, SHA-256 {digest}")

    def of(self, name: str) -> Tensor | None:
        """A tensor's logits, or None where it has none."""
        stored = next((t for t in self.shard.tensors if t.name == name), None)
        if stored is None:
            return None
        with open(self.shard.path, "rb") as file:
            return as_tensor(stored, read_bytes(file, stored))
