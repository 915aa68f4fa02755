"""A method that edits a model in rounds, instead of training it: directions are cut out, weights pruned.

An attacker's round is his next try; a defense has one. One that acts during fine-tuning hooks the model in `apply` and
takes the hooks off in `close`; in between somebody else trains. A subclass says what a round does:

    class Mine(Edit):
        roles = {"harmful": Role("attack_requests"), "harmless": Role("instructions")}

        def apply(self, data):
            for direction in self.search(data["harmful"], data["harmless"]):
                cut(self.model, direction)
                yield {"norm": direction.norm()}
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any, Self

from torch import nn

from fastguard.methods.training import Figures, Role
from fastguard.settings import Settings

Batches = Mapping[str, Sequence[Any]]
"""All batches of each role: an edit reads its data as often as it likes."""


class Edit:
    """An edit of one model.

    Args:
        model: a causal language model. seed: of all that is drawn.

    Attributes:
        roles: what `apply` reads, by name. rounds: how many it makes at most. model: what is edited.
    """

    roles: Mapping[str, Role] = {}
    rounds: int = 1

    def __init__(self, model: nn.Module, *, seed: int = 0) -> None:
        self.model, self.seed = model, seed

    @classmethod
    def from_options(cls, model: nn.Module, options: Settings, *, seed: int = 0) -> Self:
        """The method with its options."""
        return cls(model, **options.to_dict(), seed=seed)

    def apply(self, data: Batches) -> Generator[Figures]:
        """Make one round after the other; after each the model is what that round made of it. Yields its figures."""
        raise NotImplementedError(f"{type(self).__name__} has no apply()")

    def close(self) -> None:
        """Take off the model what is no part of it; an edit that is not in the weights is undone."""
