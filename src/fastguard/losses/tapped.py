"""What every loss with taps does around them: the life of a call, the rows that carry loss, the refusal of NaN.

A call is the same for all of them: shards are put back, the head is gathered for the taps, one forward or several run
through the taps, what the taps found is copied out of each forward's scope before that forgets it, values that are not
finite are refused, and the loss goes through a gate that tells the backward whose it is.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from fastguard.losses import guards
from fastguard.ranks import DataRanks, data_ranks, refuse_other_parallelism
from fastguard.taps import Gate, Lens, Scope, Structure, Taps, tap_hidden_states
from fastguard.taps.structure import compiled, reshard, synchronised

Found = TypeVar("Found")

NOTHING = "no token carries loss"


class Reading(Scope, Generic[Found]):
    """A scope that can say what its forward found."""

    def found(self) -> Found | None:
        """What the taps found, asked for before `end`; None where one of them did not fire."""
        raise NotImplementedError


class Numbers(Reading[tuple[Tensor, ...]]):
    """A forward of which each hidden state is worth a vector.

    Args:
        statistic: from a state's index, the state [B, T, D] and whether its result is kept (False in a recomputation)
            to a vector, empty where the state is not read. count: hidden states, L + 1.
    """

    numbers: dict[int, Tensor]

    def __init__(self, statistic: Callable[[int, Tensor, bool], Tensor], count: int) -> None:
        super().__init__()
        self.statistic, self.count = statistic, count
        self.end()

    def observe(self, kind: str, index: int, x: Tensor, keep: bool) -> None:
        """See `Scope.observe`: a hidden state."""
        numbers = self.statistic(index, x, keep)
        if keep:
            self.numbers[index] = numbers

    def found(self) -> tuple[Tensor, ...] | None:
        """See `Reading.found`."""
        return tuple(self.numbers[i] for i in range(self.count)) if len(self.numbers) == self.count else None

    def end(self) -> None:
        """See `Scope.end`."""
        self.numbers = {}


class Call:
    """The forwards of one call of a loss; see `Tapped.call`.

    Attributes:
        lens: the head as the taps read it; None where the call reads none.
        ranks: over which sums and means are to be taken (``fastguard.over_ranks``); None: this one alone.
    """

    def __init__(self, tapped: Tapped, model: nn.Module, lens: Lens | None, ranks: DataRanks | None) -> None:
        self.lens, self.ranks = lens, ranks
        self._tapped, self._model = tapped, model
        self._zero: Tensor | None = None
        self._scopes: list[Scope] = []

    @property
    def zero(self) -> Tensor:
        """What the loss must add for a wrapper's backward: 0 times the logits that the forwards made (see `run`)."""
        assert self._zero is not None, "read first"
        return self._zero

    def read(self, batch: Mapping[str, Tensor], scope: Reading[Found]) -> Found:
        """Run the model on ``batch`` through the taps; what ``scope`` found.

        Raises RuntimeError where taps did not fire.
        """
        self._scopes.append(scope)
        scope.positions = batch["input_ids"].numel()
        with self._tapped.taps.on(scope):
            zero = run(self._tapped.structure, self._model, batch)
            found = scope.found()
        if found is None:
            raise RuntimeError(
                f"{self._tapped.loss}: the forward did not pass its taps. Construct the loss before the first call of "
                "a compiled model, and let model= be a wrapper of the model that the loss was constructed with, not a "
                "copy of it"
            )
        self._zero = zero if self._zero is None else self._zero + zero
        return found

    def numbers(
        self, batch: Mapping[str, Tensor], statistic: Callable[[int, Tensor, bool], Tensor]
    ) -> tuple[Tensor, ...]:
        """What ``statistic`` makes of each of the L + 1 hidden states of one forward (see `Numbers`), in their order.

        They are ready for their backward, together or apart; what is left out costs a backward nothing.
        """
        found = self.read(batch, Numbers(statistic, len(self._tapped.structure.layers) + 1))
        return tuple(self.gated(numbers + self.zero) for numbers in found)

    def gated(self, value: Tensor) -> Tensor:
        """``value``, computed from what the forwards found, ready for its backward."""
        taps, scopes = self._tapped.taps, self._scopes
        return Gate.apply(value, taps, scopes) if value.requires_grad else value  # type: ignore[no-any-return]


class Tapped:
    """A model with one loss's taps on it.

    Args:
        loss: its name, for errors. model: as the loss was given it. structure: its parts.
        mlps: also tap the output of every MLP, of kind ``mlp``. over_ranks: sums and means of calls with gradients are
            those of all data ranks; a call without them may be one rank's alone.
    """

    def __init__(
        self, loss: str, model: nn.Module, structure: Structure, mlps: bool = False, over_ranks: bool = False
    ) -> None:
        self.loss, self.model, self.structure, self.over_ranks = loss, model, structure, over_ranks
        self.places = guards.Places(structure, mlps)
        self.taps = Taps(structure.model)
        tap_hidden_states(self.taps, structure)
        for i, mlp in enumerate(structure.mlps if mlps else ()):
            self.taps.output(mlp, "mlp", i)

    @contextlib.contextmanager
    def call(self, model: nn.Module | None, lens: Callable[[], Lens] | None = None) -> Iterator[Call]:
        """One call of the loss on ``model``, by default the one that the loss was given; loss arithmetic goes inside.

        lens: makes the head that the taps read, once shards are back.

        Raises ValueError for a model= that was forgotten (see ``guards.chosen``) or that is parallel in a way that is
        not supported, RuntimeError after ``close`` or where parts of the model were replaced.
        """
        self.taps.check_open()
        wrapped = guards.chosen(self.loss, self.model, model)
        refuse_other_parallelism(wrapped)
        self.places.check(self.loss)
        reshard(wrapped)
        ranks = data_ranks(wrapped) if self.over_ranks and torch.is_grad_enabled() else None
        head = None if lens is None else lens()
        if head is not None and compiled(wrapped):
            head.begin()
        try:
            yield Call(self, wrapped, head, ranks)
        finally:
            if head is not None:
                head.end()


def warn_of_full_logits(structure: Structure, stacklevel: int = 3) -> None:
    """Warn where the model cannot be told to make no [B, T, V] logits."""
    if "logits_to_keep" not in structure.arguments:
        warnings.warn(
            f"{type(structure.model).__name__}.forward has no logits_to_keep: each call makes its full logits",
            stacklevel=stacklevel,
        )


def run(structure: Structure, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """One forward; returns what the loss must add for a wrapper's backward: 0 * (what logits it made), or nothing.

    FSDP2 and DDP hang their backward on the model's output. Elsewhere the term would cost a [V, D] gradient of zeros,
    and one logit a sequence the reading of the whole head: transformers' own models are asked for none.
    """
    hung = synchronised(model, structure.model)
    options: dict[str, Any] = {}
    if "logits_to_keep" in structure.arguments:
        device = next(structure.head.parameters()).device  # where hidden states are by then; meta: offloaded
        none = not hung and device.type != "meta" and type(structure.model).__module__.startswith("transformers.")
        options["logits_to_keep"] = torch.empty(0, dtype=torch.int64, device=device) if none else 1
    if "use_cache" in structure.arguments:
        options["use_cache"] = False
    out = model(**{k: v for k, v in batch.items() if k != "labels"}, **options)
    logits: Tensor = out.logits if hasattr(out, "logits") else out[0]
    return 0 * logits.sum() if hung else logits.new_zeros(())


def next_tokens(batch: Mapping[str, Tensor], name: str, some: bool = True) -> tuple[Tensor, Tensor]:
    """Rows into the flattened positions of a plain batch and the tokens they predict.

    The tokens are the ``labels`` other than -100, else those that the attention mask keeps, else all.
    Raises a ValueError that calls the batch ``name``, also where there are none, unless that may be (``some``).
    """
    counts = carrying(batch, name)
    where = counts.nonzero()
    if some and where.shape[0] == 0:
        raise ValueError(f"{name}: {NOTHING}")
    ids = batch["input_ids"]
    return where[:, 0] * ids.shape[1] + where[:, 1], batch.get("labels", ids)[:, 1:][counts]


def carrying(batch: Mapping[str, Tensor], name: str) -> Tensor:
    """[B, T - 1] bool: which tokens after the first carry loss (see `next_tokens`). Raises where it is no batch."""
    guards.a_batch(batch, name)
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise ValueError(f"{name}: expected input_ids of shape [B, T]")
    if "labels" in batch:
        return batch["labels"][:, 1:] != -100
    return (batch["attention_mask"] != 0 if "attention_mask" in batch else ids >= 0)[:, 1:]


def check_finite(loss: str, values: Mapping[str, Tensor]) -> None:
    """Raise a FloatingPointError that names the first of the 0-dim ``values`` that is not finite; one copy to host."""
    wide = list(values.values())[-1].dtype
    given = torch.stack([value.detach().to(wide) for value in values.values()]).tolist()
    for name, value in zip(values, given, strict=True):
        if not math.isfinite(value):
            raise FloatingPointError(f"{loss}: {name} is {value}")
