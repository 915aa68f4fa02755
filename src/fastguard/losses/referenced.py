"""What losses that hold a model against its frozen self share: two batches in one frozen and one live forward."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fastguard.losses import guards, tapped
from fastguard.losses.joined import joined
from fastguard.nested.reference import Reference
from fastguard.ranks import DataRanks
from fastguard.taps import Structure, find_structure
from fastguard.taps.shallow import shallow

POSITIONS = ("attended", "labels")

Statistic = Callable[[int, Tensor, bool], Tensor]
"""See ``tapped.Numbers``."""


class Pair:
    """A harmful and a retain batch as one, and the tokens of each that count.

    Attributes:
        batch: the joined one [B, T], harmful samples first. split: how many these are.
        bad, good: bool, flat: which tokens of its harmful and of its other samples count.
        places: tokens of the retain batch as it was given, padding too.
    """

    def __init__(self, harmful: Mapping[str, Tensor], retain: Mapping[str, Tensor], positions: str) -> None:
        given = {"harmful": harmful, "retain": retain}
        self.batch = joined(given)
        self.split, self.places = harmful["input_ids"].shape[0], retain["input_ids"].numel()
        length = self.batch["input_ids"].shape[1]
        self.bad, self.good = (_counts(name, batch, positions, length).flatten() for name, batch in given.items())


def _counts(name: str, batch: Mapping[str, Tensor], positions: str, length: int) -> Tensor:
    ids = batch["input_ids"]
    if positions == "labels":
        if "labels" not in batch:
            raise ValueError(f"{name}: expected labels, since positions is 'labels', got none")
        counts = batch["labels"] != -100
    else:
        counts = batch.get("attention_mask", torch.ones_like(ids)) != 0
    if not bool(counts.any()):
        raise ValueError(f"{name}: expected a token that counts (positions={positions!r}), got none")
    return nn.functional.pad(counts, (0, length - ids.shape[1]))


class ReferencedLoss(guards.Uncopied, nn.Module):
    """A loss on a harmful and a retain batch, live hidden states against frozen ones.

    The model is not a submodule: the loss has no parameters, ``.train()``, ``.to()`` do not reach the model. A run is
    resumed by constructing the loss on the model as it was, for that is the reference, and loading weights and
    ``state_dict`` after that.

    Args:
        model, reference, structure, check_finite, positions: see the subclasses.
        over_ranks: see the subclasses that take it.

    Attributes:
        components: of the last call with gradients, detached. evaluation: of the last one without.
        last: the index of the last hidden state, L. depth: how many layers run; a subclass sets it.
    """

    depth: int

    def __init__(
        self, model: nn.Module, *, positions: str, reference: Reference | None, structure: Structure | None,
        check_finite: bool, over_ranks: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if positions not in POSITIONS:
            raise ValueError(f"positions: expected {' or '.join(POSITIONS)}, got {positions!r}")
        self.structure = find_structure(model) if structure is None else structure
        tapped.warn_of_full_logits(self.structure)
        self.last, self.positions, self.check_finite = len(self.structure.layers), positions, check_finite
        self.reference = Reference(model) if reference is None else reference
        self.components: dict[str, Tensor] = {}
        self.evaluation: dict[str, Tensor] = {}
        self._tapped = tapped.Tapped(type(self).__name__, model, self.structure, over_ranks=over_ranks)
        self._finalizer = weakref.finalize(self, self._tapped.taps.close)
        self._finalizer.atexit = False

    def forward(
        self, *, harmful: Mapping[str, Tensor], retain: Mapping[str, Tensor], model: nn.Module | None = None
    ) -> Tensor:
        """The loss, 0-dim, in fp32 (float64 for a float64 model).

        Args:
            harmful: requests with harmful answers. retain: refusals and ordinary answers. Each ``input_ids`` [B, T],
                and optionally ``attention_mask`` and ``labels`` [B, T]; the two may differ in both sizes.
            model: the model as wrapped by DDP, FSDP or accelerate after construction; may be left out with one
                process, and where FSDP2 shards the model in place. With several processes and a model that is neither
                wrapped nor sharded, passing that bare model says that you average its gradients yourself.

        Raises:
            ValueError: batches that do not fit, or without a token that counts; model left out where the ranks would
                drift apart.
            FloatingPointError: a component is not finite; the message names it and its layer.
            RuntimeError: a checkpoint around taps that drops gradients, or taps that did not fire; head, norm or layers
                were replaced after construction; the loss was closed.
        """
        pair = Pair(harmful, retain, self.positions)
        wrapped = guards.chosen(type(self).__name__, self._tapped.model, model)
        with self.reference.consulted(wrapped), self._tapped.call(wrapped) as call:
            frozen = self._read(call, wrapped, pair, self._frozen(pair))
        with self._tapped.call(wrapped) as call:
            numbers = self._read(call, wrapped, pair, self._live(pair, frozen))
            parts, loss = self._combine(pair, numbers, call.zero, call.ranks)
            found = {name: value.detach() for name, value in parts.items()}
            if self.check_finite:
                self._check_finite(found)
            if torch.is_grad_enabled():
                self.components = found
                self._has_trained()
            else:
                self.evaluation = found
            return call.gated(loss)

    def check(self, *, harmful: Mapping[str, Tensor], retain: Mapping[str, Tensor]) -> None:
        """Raise the ValueError that a call would raise for batches that do not fit."""
        Pair(harmful, retain, self.positions)

    def _read(self, call: tapped.Call, model: nn.Module, pair: Pair, statistic: Statistic) -> tuple[Tensor, ...]:
        """What ``statistic`` makes of each hidden state of one forward of the layers that are read."""
        with shallow(self.structure, model, self.depth):
            return call.read(pair.batch, tapped.Numbers(statistic, self.last + 1))

    def _frozen(self, pair: Pair) -> Statistic:
        """What is kept of each frozen hidden state."""
        raise NotImplementedError

    def _live(self, pair: Pair, frozen: Sequence[Tensor]) -> Statistic:
        """What is made of each live hidden state, a vector that is empty for those that are not read."""
        raise NotImplementedError

    def _combine(
        self, pair: Pair, numbers: Sequence[Tensor], zero: Tensor, ranks: DataRanks | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The components, ``loss`` among them, and the loss; ``zero`` is to be added to it."""
        raise NotImplementedError

    def _named(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """0-dim components under the names that an error gives them."""
        raise NotImplementedError

    def _has_trained(self) -> None:
        """A call with gradients has gone well."""

    def check_components(self) -> None:
        """Raise the FloatingPointError that names what of the last call's ``components`` is not finite, if anything."""
        self._check_finite(self.components)

    def _check_finite(self, parts: Mapping[str, Tensor]) -> None:
        tapped.check_finite(type(self).__name__, {**self._named(parts), "loss": parts["loss"]})

    def close(self) -> None:
        """Remove the hooks from the model; the loss is of no use afterwards."""
        self._finalizer()


def checked_layers(layers: Sequence[int], last: int) -> tuple[int, ...]:
    """``layers`` as a tuple. Raises ValueError unless they are indices of hidden states 0 to ``last``, each once."""
    found = tuple(layers)
    if not 0 < len(set(found)) == len(found) or not all(
        isinstance(i, int) and not isinstance(i, bool) and 0 <= i <= last for i in found
    ):
        raise ValueError(f"layers: expected indices of hidden states, 0 to {last}, each once, got {found}")
    return found
