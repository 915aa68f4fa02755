"""The sums themselves: in place, or for weights that FSDP2 shards divided among the ranks as the weights are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastguard.directions.prompts import sharded
from fastguard.ops.precision import accumulation_dtype
from fastguard.saliency.places import Place

BACKWARD = {"snip": "score", "fisher": "squared", "signed": "signed"}
"""Statistics of gradients, and the arguments of ``abs_weight_grad_`` that they are."""
FORWARD = ("wanda", "gram")
"""Statistics of inputs."""
STATISTICS = (*BACKWARD, *FORWARD)


class Sums:
    """Sums of statistics by weight.

    Args:
        statistics: in the order of `STATISTICS`.

    Attributes:
        values: statistic -> weight -> sum; a DTensor where the weight is one.
        inputs: weight -> the weight under whose name the statistics of its input stand, since several maps share one.
        gradients: those of the statistics that need a backward pass.
        whole: False while, and after, a batch was taken by a part.
    """

    def __init__(self, statistics: Sequence[str]) -> None:
        self.statistics = tuple(statistics)
        self.gradients = [name for name in BACKWARD if name in statistics]
        self.values: dict[str, dict[str, Tensor]] = {name: {} for name in statistics}
        self.inputs: dict[str, str] = {}
        self.whole = True
        self._shards: dict[str, tuple[Any, Any]] = {}

    def follow(self, model: nn.Module, places: Iterable[Place]) -> None:
        """Note how the weights are sharded, between forwards. Raises ValueError for others than FSDP2's row shards."""
        self._shards = {}
        for place in places:
            weight: Any = place.module.weight
            if not hasattr(weight, "placements"):
                continue
            rows = (p.is_replicate() or (p.is_shard() and p.dim == 0) for p in weight.placements)
            if not sharded(model) or not all(rows):
                raise ValueError(
                    f"model: {place.name} is a DTensor placed {weight.placements}; expected weights that FSDP2 shards "
                    "by rows (tensor parallelism is not supported)"
                )
            self._shards[place.name] = weight.device_mesh, weight.placements

    def into(
        self, place: Place, kinds: Sequence[str], shape: Sequence[int], like: Tensor,
        fill: Callable[[dict[str, Tensor]], None],
    ) -> None:  # fmt: skip
        """Let ``fill`` add to the sums of ``kinds``: in place, or for a shard to zeros that the ranks then divide.

        like: an activation, whose device and accumulation dtype a new sum gets.
        """
        self.whole = False
        name = place.name if kinds[0] in BACKWARD else self.inputs[place.name]
        # A vector a weight costs nothing, and holds the squares of any number of tokens.
        dtype = torch.float64 if kinds[0] == "wanda" else accumulation_dtype(like.dtype)
        shards = self._shards.get(place.name)
        if shards is None:
            for kind in kinds:
                if name not in self.values[kind]:
                    self.values[kind][name] = torch.zeros(shape, dtype=dtype, device=like.device)
            fill({kind: self.values[kind][name] for kind in kinds})
            return
        from torch.distributed.tensor import DTensor, Partial, Replicate

        mesh, placements = shards
        more = {kind: torch.zeros(shape, dtype=dtype, device=like.device) for kind in kinds}
        fill(more)
        for kind in kinds:
            together = DTensor.from_local(more.pop(kind), mesh, [Partial()] * mesh.ndim, run_check=False)
            share = together.redistribute(placements=[Replicate()] * mesh.ndim if kind == "wanda" else placements)
            if name in self.values[kind]:
                local(self.values[kind][name]).add_(local(share))
            else:
                self.values[kind][name] = share

    def flat(self) -> dict[str, Tensor]:
        """All sums under ``statistic/weight``."""
        return {f"{kind}/{name}": value for kind, each in self.values.items() for name, value in each.items()}

    def check_whole(self) -> None:
        """Raise a RuntimeError where a batch was taken by a part."""
        if not self.whole:
            raise RuntimeError(
                "saliency: a batch failed half-way, and the sums hold a part of it; load the state of before, or begin "
                "again"
            )


def local(value: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    shard: Any = value
    return shard.to_local() if hasattr(value, "to_local") else value  # type: ignore[no-any-return]
