"""What an estimation found, and the small file that it is kept in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastguard.directions.edit import checked_basis
from fastguard.directions.file import BASIS, read_tensors, write_tensors

FORMAT = "fastguard.directions"
VERSION = 1
REQUIRED = ("harmful", "harmless")
OPTIONAL = ("harmful_square", "harmless_square")


@dataclass(frozen=True)
class Directions:
    """Means of the stream over two classes of instructions, by position and layer.

    Attributes:
        harmful, harmless: means [P, L, D] of the stream at the input of each layer (and the last output, if asked for).
        counts: prompts of each class.
        positions: which P, counted from the prompt's end, ascending: (-5, ..., -1).
        harmful_square, harmless_square: means of squares [P, L, D], or None.
        model_hash, data_hash: of the model and the prompts that they were estimated on; empty where not given.
    """

    harmful: Tensor
    harmless: Tensor
    counts: tuple[int, int]
    positions: tuple[int, ...]
    harmful_square: Tensor | None = None
    harmless_square: Tensor | None = None
    model_hash: str = ""
    data_hash: str = ""

    def __post_init__(self) -> None:
        given = {name: t for name in (*REQUIRED, *OPTIONAL) if (t := getattr(self, name)) is not None}
        for name, tensor in given.items():
            if tensor.dim() != 3 or tensor.shape != self.harmful.shape or tensor.dtype != self.harmful.dtype:
                raise ValueError(
                    f"{name}: expected [positions, layers, D] as harmful has, {tuple(self.harmful.shape)} of "
                    f"{self.harmful.dtype}, got {tuple(tensor.shape)} of {tensor.dtype}"
                )
        if len(self.positions) != self.harmful.shape[0] or any(p >= 0 for p in self.positions):
            raise ValueError(f"positions: expected {self.harmful.shape[0]} negative numbers, got {self.positions}")
        if len(self.counts) != 2 or min(self.counts) < 1:
            raise ValueError(f"counts: expected two numbers of prompts, got {self.counts}")

    @property
    def difference(self) -> Tensor:
        """Harmful less harmless means, [P, L, D], not normalised."""
        return self.harmful - self.harmless

    def at(self, position: int, layer: int) -> Tensor:
        """The difference [D] at a position counted from the end and a layer. Raises ValueError if it was not read."""
        if position not in self.positions:
            raise ValueError(f"position: expected one of {list(self.positions)}, got {position}")
        if not 0 <= layer < self.harmful.shape[1]:
            raise ValueError(f"layer: expected 0 to {self.harmful.shape[1] - 1}, got {layer}")
        return self.difference[self.positions.index(position), layer]

    def save(self, file: str | Path, basis: Tensor | None = None, about: Mapping[str, str] | None = None) -> None:
        """Write a safetensors file with its origin, whole or not at all.

        Args:
            file: its path.
            basis: [K, D] with orthonormal rows: what was chosen out of these means, which ``fastguard ablate`` and
                ``fastguard.edits.basis.read_basis`` read.
            about: what else to note in the file's metadata, under names that it has not yet.

        Raises ValueError for a basis of other rows, or a name that is taken.
        """
        tensors = {name: t for name in (*REQUIRED, *OPTIONAL) if (t := getattr(self, name)) is not None}
        if basis is not None:
            tensors[BASIS] = checked_basis(basis, self.harmful.shape[-1])
        own = {
            "format": FORMAT,
            "version": str(VERSION),
            "positions": json.dumps(list(self.positions)),
            "counts": json.dumps(list(self.counts)),
            "model_hash": self.model_hash,
            "data_hash": self.data_hash,
        }
        if taken := sorted(set(own) & set(about or {})):
            raise ValueError(f"about: expected other names than {', '.join(own)}, got {', '.join(taken)}")
        write_tensors(file, tensors, {**own, **(about or {})})

    @classmethod
    def load(cls, file: str | Path, *, model_hash: str | None = None, data_hash: str | None = None) -> Directions:
        """Read the means that `save` wrote.

        Args:
            model_hash, data_hash: what the file must have been made from; None accepts any.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: another kind of file, another version, contents that do not fit, or another origin.
        """
        path = Path(file)
        tensors, about = read_tensors(path)
        tensors.pop(BASIS, None)
        if about.get("format") != FORMAT:
            raise ValueError(f"directions: {str(path)!r} holds no directions; expected a file of Directions.save")
        if about.get("version") != str(VERSION):
            raise ValueError(f"directions: {str(path)!r} is of version {about.get('version')}, expected {VERSION}")
        if not set(REQUIRED) <= set(tensors) <= {*REQUIRED, *OPTIONAL}:
            raise ValueError(f"directions: {str(path)!r} holds {sorted(tensors)}, expected {list(REQUIRED)}")
        if any(not torch.isfinite(t).all() for t in tensors.values()):
            raise ValueError(f"directions: {str(path)!r} holds values that are not finite")
        for name, expected in (("model_hash", model_hash), ("data_hash", data_hash)):
            if expected is not None and about.get(name, "") != expected:
                what = name.removesuffix("_hash")
                raise ValueError(
                    f"directions: {str(path)!r} was made from another {what}: {name} {about.get(name) or 'not given'}, "
                    f"expected {expected}"
                )
        try:
            counts, positions = json.loads(about["counts"]), json.loads(about["positions"])
            first, second = (int(count) for count in counts)
            return cls(
                tensors["harmful"], tensors["harmless"], (first, second), tuple(int(p) for p in positions),
                tensors.get("harmful_square"), tensors.get("harmless_square"),
                about.get("model_hash", ""), about.get("data_hash", ""),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"directions: {str(path)!r} does not fit together: {error}") from error
