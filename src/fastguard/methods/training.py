"""A method that trains: it leaves gradients; optimizer, schedule, sharding and data are the caller's.

A subclass is what its paper adds to a training step and no more:

    class Mine(Training):
        roles = {"harmful": Role("harmful"), "harmless": Role("safe")}

        def gradient(self, step: Step, *, harmful: Batch, harmless: Batch) -> Figures:
            loss = step.loss(harmless) - 0.1 * step.loss(harmful)
            return {"loss": step.differentiate(loss, "both batches")}

`Training.backward` is the same for all: arguments checked by name, gradients all added or none, counters put back and
the model's bits untouched whatever is raised.

A step does not depend on the number of ranks: means are over the tokens, and norms over the samples, of all data ranks
(``fastguard.over_ranks``), and what is wrong with one rank's batches is raised by all before the first pass.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from fastguard.losses import guards
from fastguard.losses.language_model import LanguageModelLoss
from fastguard.losses.pieces import divided, pieces
from fastguard.machine import ranks as job_ranks
from fastguard.methods.passes import Batch, Loss, differentiate, finite_norm, inspect, tokens
from fastguard.nested.gradients import added_gradients
from fastguard.nested.guard import derived_seed, own_random_numbers
from fastguard.nested.profile import span
from fastguard.nested.weights import Select, Weights
from fastguard.ops.multi_tensor import accumulate_
from fastguard.over_ranks import agreed, gathered, several, weighted
from fastguard.ranks import data_ranks
from fastguard.settings import Settings
from fastguard.taps.structure import Structure

Figures = dict[str, Tensor]
"""0-dim and detached, by name; ``loss`` is among them."""

Stream = Callable[[int], Any]
"""A batch, or several by name, as a function of its number: it needs no state to be resumed."""

Data = Mapping[str, Stream]
"""Streams by role."""

Passes = Sequence[tuple[Callable[[], Tensor], float]]
"""A loss as the weighted sum of what functions return that run a forward each."""


PAIR = "pair"
"""The role whose draw is two batches, ``harmful`` and ``harmless``."""


@dataclass(frozen=True)
class Role:
    """What an argument of ``backward`` is drawn from, where a run has the data.

    Attributes:
        data: ``harmful``: requests with harmful answers; ``refusal``: requests refused; ``retain``: ordinary
            instructions with answers; ``safe``: refusals and retain samples as one batch; ``pair``: the same requests
            twice, as batches ``harmful`` and ``harmless`` of one shape; ``attacker`` and ``held_out``: harmful, from
            two halves of the requests, for a simulated attacker and for what is read at its weights; ``preference``:
            held out, as ``chosen`` refusals and ``rejected`` answers; ``benign``: retain samples in an order of their
            own. In attacks ``attack``: the attacker's harmful samples. Edits have ``harmful``, ``refusal``, ``retain``,
            and prompts alone as ``instructions`` and, in attacks, ``attack``.
        count: samples of a batch; None: as many as the run says.
        optional: whether ``backward`` does without it.
    """

    data: str
    count: int | None = None
    optional: bool = False


class Training:
    """Gradients of one step of a method.

        method = Method(model)                              # before compilation, DDP and FSDP2
        figures = method.backward(harmful=..., harmless=..., model=wrapped)
        optimizer.step(); optimizer.zero_grad()

    Args:
        model: a causal language model, plain or PEFT.
        loss: (model, batch) -> 0-dim loss, a mean over the tokens that carry loss; None: the cross-entropy of
            ``LanguageModelLoss``.
        seed: of all that is drawn, as functions of (seed, step, data rank).
        structure: what ``find_structure`` found, if the caller has it already.
        reads: whose gradients are wanted; None: every parameter's that requires one.
        micro: samples that pass through the model at a time, at most: a batch of more is divided, the gradients of its
            parts are weighted and summed, which is the undivided batch's. None: batches pass whole.

    Attributes:
        roles: the arguments of `backward` by name. step: backwards so far. loss_is_own: whether ``loss`` is over all
            ranks by itself, being this package's; a caller's is a mean over one rank's tokens.
        model: what is trained; an attack may have wrapped what it was given.
    """

    roles: Mapping[str, Role] = {}
    reads_output: ClassVar[bool] = False
    """Whether ``language``, the losses on the output, is wanted beside a ``loss`` of the caller's."""

    def __init__(
        self, model: nn.Module, *, loss: Loss | None = None, seed: int = 0, structure: Structure | None = None,
        reads: Select = None, micro: int | None = None,
    ) -> None:  # fmt: skip
        if micro is not None and (isinstance(micro, bool) or not isinstance(micro, int) or micro < 1):
            raise ValueError(f"micro: expected None or an int >= 1, got {micro!r}")
        self.model, self.seed, self.reads, self.micro, self.step = model, seed, reads, micro, 0
        self._language: LanguageModelLoss | None = None
        if loss is None or self.reads_output:
            self._language = LanguageModelLoss(model, structure=structure, check_finite=False, over_ranks=True)
        self.loss: Loss = loss or self._cross_entropy
        self.loss_is_own = loss is None

    @classmethod
    def from_options(cls, model: nn.Module, options: Settings, *, seed: int = 0) -> Self:
        """The method with its options; a class whose arguments have other names says so here."""
        return cls(model, **options.to_dict(), seed=seed)

    @property
    def language(self) -> LanguageModelLoss:
        """Losses on the model's output."""
        assert self._language is not None
        return self._language

    def _cross_entropy(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.language(batch, model=model)

    def gradient(self, step: Step, **batches: Any) -> Figures:
        """All that a paper adds: leave the step's gradient on ``step.weights``. Returns the figures."""
        raise NotImplementedError(f"{type(self).__name__} has no gradient()")

    def prepare(self, model: nn.Module, **batches: Any) -> Select:
        """What comes before earlier gradients are put aside. Returns whose gradients are wanted."""
        return self.reads

    def backward(self, *, model: nn.Module | None = None, scale: float = 1.0, **batches: Any) -> Figures:
        """Add ``scale`` times the step's gradient to every parameter's.

        Args:
            model: as wrapped by DDP, FSDP2 or accelerate; may be left out with one process, and where FSDP2 shards the
                model in place. scale: 1 / micro-batches of an optimizer step.
            batches: those that `roles` names.

        Returns figures, 0-dim and detached, ``loss`` among them.

        Whatever is raised, parameters, buffers, earlier gradients and counters are as they were.

        Raises:
            TypeError: batches that are missing or not known. FloatingPointError: a loss or gradient is not finite.
            ValueError: model left out although several processes train a model that is neither wrapped nor sharded; on
                several processes, on all of them, whatever batches of one of them are refused for.
        """
        batches = agreed(lambda: self.checked(batches))
        model = guards.chosen(type(self).__name__, self.model, model)
        before = self.state_dict()
        try:
            select = self.prepare(model, **batches)
            with added_gradients(model, select) as weights:
                figures = self.gradient(Step(self, model, weights, scale), **batches)
        except BaseException:
            self.load_state_dict(before)
            raise
        self.step += 1
        return figures

    def checked(self, batches: Mapping[str, Any]) -> dict[str, Any]:
        """The batches as `gradient` takes them; raises, before the first pass, what one rank might find alone."""
        self._check(batches)
        if job_ranks() > 1:
            self.inspect(**batches)
        return dict(batches)

    def inspect(self, **batches: Any) -> None:
        """Raise what is wrong with the batches, which is otherwise raised where they are used."""
        inspect({name: batch for name, batch in batches.items() if isinstance(batch, Mapping)})

    def trained_by(self, optimizer: Any) -> None:
        """Say whose steps follow the gradients: a method may move its states aside while they are not needed."""

    def draw(self, data: Data) -> dict[str, Any]:
        """The arguments of `backward` for the coming step, a function of ``self.step``."""
        return self.complete({name: data[name](self.step) for name in self.roles if name in data}, data)

    def complete(self, batches: Mapping[str, Any], data: Data) -> dict[str, Any]:
        """Batches of a trainer's own loader, a ``pair`` as its two, and what the method draws beside them."""
        return {**batches.get(PAIR, {}), **{name: batch for name, batch in batches.items() if name != PAIR}}

    def evaluate(self, batches: Mapping[str, Any], model: nn.Module | None = None) -> Figures:
        """Figures of held-out batches by name, without gradients, and nothing of the training is moved.

        Here the method's loss of each plain batch as ``NAME_ce``; ``loss`` is the mean of those that are not harmful.
        """
        model = self.model if model is None else model
        plain = {name: batch for name, batch in batches.items() if "input_ids" in batch}
        with torch.no_grad():
            found = {f"{name}_ce": self.loss(model, batch).detach() for name, batch in plain.items()}
        if not found:
            raise ValueError(f"{type(self).__name__}.evaluate: expected batches with input_ids, got {sorted(batches)}")
        harmless = [value for name, value in found.items() if name not in ("harmful_ce", "tamper_ce")]
        return {"loss": torch.stack(harmless or list(found.values())).mean(), **found}

    def _check(self, batches: Mapping[str, Any]) -> None:
        needed, also = self.arguments(), self.optional()
        if any(batches.get(name) is None for name in needed) or not batches.keys() <= {*needed, *also}:
            optionally = f", optionally {', '.join(also)}" if also else ""
            raise TypeError(
                f"{type(self).__name__}.backward: expected batches {', '.join(needed)}{optionally}; "
                f"got {', '.join(batches) or 'none'}"
            )

    def arguments(self) -> tuple[str, ...]:
        """The batches that `backward` needs."""
        needed = [name for name, role in self.roles.items() if not role.optional]
        return tuple(one for name in needed for one in (("harmful", "harmless") if name == PAIR else (name,)))

    def optional(self) -> tuple[str, ...]:
        """The batches that `backward` takes and does without."""
        return tuple(name for name, role in self.roles.items() if role.optional)

    def state_dict(self) -> dict[str, Any]:
        """What a new object needs to go on as this one would."""
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.step = int(state["step"])

    def close(self) -> None:
        """Take the hooks off the model."""
        if self._language is not None:
            self._language.close()


class Step:
    """What `Training.gradient` works with: the model as wrapped, its trainable weights, and the passes.

    Attributes:
        model: to run, as wrapped. weights: its parameters, without gradients at first. ranks: whose batches are one.
        scale: the caller's; `differentiate` and `put` do not apply it by themselves.
    """

    def __init__(self, method: Training, model: nn.Module, weights: Weights, scale: float) -> None:
        self.method, self.model, self.weights, self.scale = method, model, weights, scale
        self.ranks = data_ranks(model)

    def loss(self, batch: Batch, model: nn.Module | None = None) -> Tensor:
        """The method's loss of a batch, and of those that the other ranks have; ``model``: another one than the step's.

        It is the same number on all ranks.
        """
        value = self.method.loss(self.model if model is None else model, batch)
        return value if self.method.loss_is_own else self.mean(value, batch)

    def mean(self, value: Tensor, batch: Batch) -> Tensor:
        """The mean of all ranks' batches, from that of this one's over its tokens that carry loss."""
        return weighted(value, tokens(batch), self.ranks)

    def pieces(
        self, batch: Mapping[str, Any], count: Callable[..., Tensor | int] = tokens, beside: int = 1
    ) -> list[tuple[Any, float]]:
        """The batch in pieces of at most `Training.micro` samples, and the share of the mean that is over each.

        As many pieces on every rank, whose shares are those of all ranks' pieces together.

        Args:
            batch: tensors [B, ...] by name, or several batches by name.
            count: from a batch to how many entries the mean of its loss is over.
            beside: batches whose pieces pass together, this one's among them.

        Raises ValueError, on every rank alike, where a piece has none of these entries, or no sample.
        """
        if self.method.micro is None:
            return [(batch, 1.0)]
        found = divided(batch, pieces(batch, self.method.micro // beside, self.ranks))
        counts = torch.stack([torch.as_tensor(count(piece)) for piece in found]).tolist()
        every = gathered(counts, self.ranks) if several(self.ranks) else [counts]
        if not all(map(all, every)):
            raise ValueError(
                f"micro: expected pieces that each have a token that carries loss, on every rank; got {len(found)} "
                f"pieces with {every} such tokens"
            )
        total = sum(map(sum, every))
        return [(piece, sum(of_piece) / total) for piece, *of_piece in zip(found, *every, strict=True)]

    def passes(
        self, loss: Callable[[Any], Tensor], batch: Mapping[str, Any], count: Callable[..., Tensor | int] = tokens
    ) -> Passes:
        """``loss`` of the batch, a mean, as one pass a piece; see `pieces`."""
        return [(functools.partial(loss, piece), share) for piece, share in self.pieces(batch, count)]

    def differentiate(
        self,
        loss: Tensor | Passes,
        what: str,
        weight: float | None = None,
        only: Sequence[Tensor] = (),
        again: bool = False,
    ) -> Tensor:
        """Backward of weight * loss, by default scale * loss; returns the loss, detached. See ``passes.differentiate``.

        Passes are run and differentiated one after the other.

        Raises FloatingPointError, on every rank alike, where the loss is not finite; ``what`` names it there.
        """
        weight = self.scale if weight is None else weight
        if isinstance(loss, Tensor):
            return differentiate(self.weights, loss, self._named(what), weight, only, again)
        named = self._named(what)
        values = [share * differentiate(self.weights, run(), named, weight * share, only) for run, share in loss]
        return torch.stack(values).sum(0)

    def take(self) -> list[Tensor | None]:
        """The gradients that are on the parameters, which then have none."""
        return self.weights.take_gradients()

    def put(self, gradients: Sequence[Tensor | None], what: str = "") -> Tensor:
        """Leave these as the step's gradient; returns their norm, refused where it is not finite."""
        norm = self.norm(gradients, what)
        self.weights.put_gradients(list(gradients))
        return norm

    def norm(self, gradients: Sequence[Tensor | None], what: str = "") -> Tensor:
        """The 2-norm over all parameters and shards. Raises FloatingPointError where it is not finite."""
        return finite_norm(self.weights, gradients, self._named(what))

    @contextlib.contextmanager
    def random(self, *key: object) -> Iterator[None]:
        """Dropout inside is a function of (key, seed, step, data rank)."""
        seed = derived_seed(*key, self.method.seed, self.method.step, self.ranks.rank)
        with own_random_numbers(seed, [p.device for p in self.weights.parameters]):
            yield

    def _named(self, what: str) -> str:
        name = type(self.method).__name__
        return f"{name}: {what}" if what else name


def add(into: list[Tensor | None], gradients: Sequence[Tensor | None], weight: float) -> None:
    """into += weight * gradients, in place; a parameter without a gradient has a zero one."""
    both = [(a, g) for a, g in zip(into, gradients, strict=True) if a is not None and g is not None]
    sums = [a for a, _ in both]
    with span("accumulate", sums, 3):
        accumulate_(sums, [g for _, g in both], weight)
    for i, g in enumerate(gradients):
        if into[i] is None and g is not None:
            into[i] = weight * g


def detached(**figures: Tensor) -> Figures:
    """Figures, detached."""
    return {name: torch.as_tensor(value).detach() for name, value in figures.items()}
