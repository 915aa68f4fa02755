"""Saliency statistics of a model's weights, the scores that are made of them, and their files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fastguard import __version__
from fastguard.edits.shards import Shard, as_tensor, read_bytes
from fastguard.saliency.file import write_tensors

FILE = "saliency.safetensors"
FORMAT = 1
SCORES = ("snip", "fisher", "wanda", "magnitude")
"""What `Scores.score` computes: of one weight each, larger where more depends on it."""


@dataclass
class Scores:
    """What `Collect` summed, of all ranks together.

    Attributes:
        sums: statistic -> weight -> sum, see `Collect`; of the statistics of inputs only one entry for all weights that
            share an input. Shards under FSDP2. Read from its file on access where it was loaded from one.
        inputs: weight -> the weight under whose name the statistics of its input stand.
        samples, answer_tokens, input_tokens: how many there were.
        layers: weight -> number of its layer, None outside of them.
        about: where they are from (model, data), in words.
    """

    sums: Mapping[str, Mapping[str, Tensor]]
    inputs: dict[str, str]
    samples: int
    answer_tokens: int
    input_tokens: int
    layers: dict[str, int | None]
    about: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The weights, in the order of the model."""
        return tuple(self.layers)

    def statistic(self, kind: str, name: str) -> Tensor:
        """One sum. Raises KeyError that says what there is."""
        if kind not in self.sums:
            raise KeyError(f"statistic: expected one of {', '.join(self.sums)}, got {kind!r}")
        found = self.inputs.get(name, name) if kind in ("wanda", "gram") else name
        if found not in self.sums[kind]:
            raise KeyError(f"name: there is no {kind} of {name!r}")
        return self.sums[kind][found]

    def score(self, kind: str, name: str, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """The score of a weight [O, I], as two factors (score, weights or None) for ``threshold_select``.

        ``snip``: |W| sum_s |dL_s/dW| (Wei et al. 2024). ``fisher``: W^2 sum_s (dL_s/dW)^2. ``wanda``:
        |W_ij| sqrt(sum_t x_tj^2 / tokens) (Sun et al. 2023). ``magnitude``: |W|, of no data.
        """
        if kind not in SCORES:
            raise ValueError(f"score: expected one of {', '.join(SCORES)}, got {kind!r}")
        if kind == "magnitude":
            return weight.abs(), None
        found = self.statistic(kind, name)
        if kind == "wanda":
            norm = (found / max(self.input_tokens, 1)).sqrt()
            return norm.to(torch.promote_types(weight.dtype, torch.float32)).expand(weight.shape), weight
        if kind == "fisher":
            return found * weight.to(found.dtype).square(), None
        return found, weight

    def save(self, folder: Path | str) -> Path:
        """Write all sums into one safetensors file, tensor by tensor, whole or not at all; shards are gathered.

        Every rank calls it; the first one writes. Returns the file.
        """
        file = Path(folder) / FILE
        tensors = {f"{kind}/{name}": value for kind, each in self.sums.items() for name, value in each.items()}
        about = {
            "format": str(FORMAT), "fastguard": __version__, "inputs": json.dumps(self.inputs),
            "counts": json.dumps([self.samples, self.answer_tokens, self.input_tokens]),
            "layers": json.dumps(self.layers), "about": json.dumps(self.about),
        }  # fmt: skip
        write_tensors(file, tensors, about)
        return file

    @classmethod
    def load(cls, folder: Path | str) -> Scores:
        """Open what `save` wrote, a folder or the file; tensors are read when they are asked for.

        Raises FileNotFoundError, or ValueError where it is something else.
        """
        file = Path(folder) / FILE if Path(folder).is_dir() else Path(folder)
        if not file.is_file():
            raise FileNotFoundError(f"scores: no file {str(file)!r}; `fastguard saliency` writes it")
        shard = Shard.open(file)
        if shard.metadata.get("format") != str(FORMAT) or "counts" not in shard.metadata:
            raise ValueError(f"scores: {str(file)!r} holds no saliency scores of format {FORMAT}")
        kinds = list(dict.fromkeys(t.name.partition("/")[0] for t in shard.tensors))
        samples, answer_tokens, input_tokens = json.loads(shard.metadata["counts"])
        return cls(
            {kind: _Lazy(shard, kind) for kind in kinds}, json.loads(shard.metadata["inputs"]), samples, answer_tokens,
            input_tokens, json.loads(shard.metadata["layers"]), json.loads(shard.metadata["about"]),
        )  # fmt: skip


class _Lazy(Mapping[str, Tensor]):
    """The tensors of one statistic in a file, by weight."""

    def __init__(self, shard: Shard, kind: str) -> None:
        self._file = shard.path
        self._stored = {t.name.partition("/")[2]: t for t in shard.tensors if t.name.partition("/")[0] == kind}

    def __getitem__(self, name: str) -> Tensor:
        stored = self._stored[name]
        with open(self._file, "rb") as file:
            return as_tensor(stored, read_bytes(file, stored))

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)
