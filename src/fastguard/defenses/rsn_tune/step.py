"""RSN-Tune (Zhao et al., ICLR 2025): SN-Tune without the neurons that general text needs, so that utility is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn

from fastguard.defenses.rsn_tune.options import Options
from fastguard.defenses.sn_tune.neurons import strongest
from fastguard.defenses.sn_tune.step import SNTune
from fastguard.methods.passes import Loss
from fastguard.methods.training import Role


class RSNTune(SNTune):
    """`SNTune` of the safety neurons that are no foundation neurons: those that every sample of general text excites.

    Args:
        model, threshold, most, parts, samples, loss, seed: see `SNTune`.
        foundation_most: foundation neurons of each matrix at most, those excited most; None, as published: all that
            pass the threshold.

    Where the published method reads Wikipedia, a run has its ordinary instructions with answers.
    """

    roles: ClassVar[Mapping[str, Role]] = {  # type: ignore[misc]
        "safety": Role("refusal"),
        "foundation": Role("retain", optional=True),  # read before the first step alone
    }
    found_by: ClassVar[tuple[str, ...]] = ("safety", "foundation")

    def __init__(
        self, model: nn.Module, *, threshold: float = Options.threshold, most: int = Options.most,
        parts: Sequence[str] = Options.parts, samples: int = Options.samples,
        foundation_most: int | None = Options.foundation_most, loss: Loss | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        Options(threshold, most, tuple(parts), samples, foundation_most)
        super().__init__(
            model, threshold=threshold, most=most, parts=parts, samples=samples, loss=loss, seed=seed
        )  # fmt: skip
        self.foundation_most = foundation_most

    def select(self, excitation: Mapping[str, Tensor]) -> Tensor:
        """See `SNTune.select`."""
        safety, foundation = excitation["safety"], excitation["foundation"]
        eligible = safety >= self.threshold
        eligible[strongest(foundation, foundation >= self.threshold, self.foundation_most)] = False
        return strongest(safety, eligible, self.most)
