"""An attacker simulated inside a training step: tampered weights, gradients read there, everything put back.

First-order nested optimisation, as in Tamper-Resistant Safeguards (Tamirisa et al. 2024, arXiv 2408.00761, algorithm
1): K steps of the attacker's optimizer from the current weights; at some of them the defender's loss is
differentiated *at the tampered weights*, and the sum of these gradients, weighted, is applied at the original ones.

    attack = SimulatedAttack(model, optimizer=AdamW(lr=2e-5))
    with attack.at(model) as tampered:
        for batch in batches:
            tampered.step(lambda: loss(batch))
            tampered.accumulate(lambda: tamper_loss(held_out), weight=0.1)
    optimizer.step()                      # p.grad: what it was before, plus the weighted sum

A loss is given as a function, so that the forward too is told whose gradients are wanted: an attacker's adapters are
then all that is differentiated and, under FSDP2 and DDP, all that is reduced. Several functions with weights are passes
of one loss, differentiated one after the other.

Memory above a training step's: one snapshot, the attacker's moments, and one accumulator; with ``masters="fp32"`` also
an fp32 copy of what the attacker moves.

Weights in bf16 or fp16 round most of a small step away. On these the attacker's first steps are compared with the same
steps in fp32, on a sample, where the host waits anyway (when the defender reads, and at the end): a
`PerturbationLostError` where over 30% is off, a warning where over 5%. fp32 weights are not looked at.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastguard.nested.guard import Restoring, derived_seed, on_every_rank, own_random_numbers, same_random_numbers
from fastguard.nested.narrow import ADVICE, Mastered, Sampled, narrow
from fastguard.nested.optimizers import AdamW, Optimizer, Running, as_rule
from fastguard.nested.persistent import PersistentAttacker
from fastguard.nested.perturbation import WARN_BELOW, Realised
from fastguard.nested.profile import span
from fastguard.nested.snapshot import Snapshot, Where
from fastguard.nested.weights import Select, Weights
from fastguard.ops.multi_tensor import accumulate_
from fastguard.ops.precision import accumulation_dtype
from fastguard.ranks import data_ranks

Losses = Tensor | Callable[[], Tensor] | Iterable[tuple[Callable[[], Tensor], float]]
"""What is differentiated: a function that runs a forward; several with weights; or a loss that is there already."""


class SimulatedAttack:
    """A recipe for attacks on ``model``; `at` runs one.

    Args:
        model: plain, PEFT, or wrapped by FSDP2 or DDP; an attack may also be handed the wrapped form later (`at`).
        optimizer: the attacker's (``nested.AdamW``, ``nested.SGD``, or anything with ``start``).
        trains: what the attacker moves: a predicate on (name, parameter), parameters, or None for all that require a
            gradient. A LoRA adversary moves its adapter alone (``nested.LoRAAdversary.trains``).
        beside: parameters by name that are none of the model's (``nested.LoRAAttackers.parameters``), which ``trains``
            may choose.
        reads: what the defender's gradient is read for; None as above.
        snapshot: ``device``, ``host``, a budget in bytes, or fp32 masters (see ``nested.Snapshot``).
        masters: ``fp32``: weights in bf16 or fp16 are the roundings of fp32 numbers that the attacker moves, so that no
            step is lost; these start from the masters that ``snapshot`` gives, or else evenly drawn from all numbers
            that round to the weights. None: the attacker writes to the weights.
        allow_lost: go on where most of the attacker's steps is rounded away.
        reduce_dtype: in which FSDP2 adds up the gradients of the attacker's steps, not those that the defender reads.
            How far that moves them is measured at the first step of an attack, by a pass more
            (``Tampered.reduction_cosine``). None: as the model was sharded.
        gathered: FSDP2 keeps the weights that it gathers over the attacker's steps, until the defender reads; for one
            who trains none of them (``nested.LoRAAttackers``), where a whole model has room on each rank.
        seed: of the random numbers (dropout) inside attacks; call k of `at` uses a function of (seed, k, data rank).

    The only state is the number of attacks so far: ``state_dict()``, ``load_state_dict()``.

    Raises:
        TypeError: ``model`` is no module, or ``optimizer`` no rule (a class, or one of torch's, which is bound to
            parameters). ValueError: ``masters``.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        trains: Select = None,
        reads: Select = None,
        beside: Mapping[str, nn.Parameter] | None = None,
        snapshot: Where = "device",
        masters: str | None = None,
        allow_lost: bool = False,
        reduce_dtype: torch.dtype | None = None,
        gathered: bool = False,
        seed: int = 0,
    ) -> None:
        _expect_module(model)
        if masters not in (None, "fp32"):
            raise ValueError(f"masters: expected 'fp32' or None, got {masters!r}")
        self.masters, self.allow_lost = masters, allow_lost
        self.model = model
        self.optimizer: Optimizer = AdamW() if optimizer is None else as_rule(optimizer)
        self.trains, self.reads, self.where, self.seed = trains, reads, snapshot, seed
        self.beside, self.reduce_dtype, self.gathered = beside, reduce_dtype, gathered
        self.calls = 0
        self._host: tuple[list[int], Snapshot] | None = None
        self._warned: set[str] = set()

    @contextlib.contextmanager
    def at(
        self,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        attacker: PersistentAttacker | None = None,
    ) -> Iterator[Tampered]:
        """An attack from the current weights of ``model`` (None: the constructor's).

        optimizer: for this attack instead of the constructor's. attacker: who goes on from where he was beside these
            weights, and is left further on, unless something is raised; he needs fp32 weights or ``masters``.

        On leaving, parameters and buffers are bit for bit what they were, whatever was raised inside, and torch's
        random numbers go on as if there had been no attack. Left without an exception, every parameter that is read
        has its earlier gradient plus the accumulated one; left by an exception, its earlier gradient.

        Raises:
            FloatingPointError: a loss or the accumulated gradient is not finite; on every rank, if it is so on one.
            PerturbationLostError: the weights' dtype keeps too little of the attacker's steps; see ``masters``.
            RuntimeError: gradients of FSDP2 wait unsynchronised.
            TypeError: an attacker whose optimizer cannot be gone on with.
            ValueError: the model has nothing that requires a gradient, or ``trains`` or ``reads`` choose nothing of it;
                an attacker on weights in bf16 or fp16 without masters.
        """
        model = self.model if model is None else model
        _expect_module(model)
        every = Weights(model, beside=self.beside)
        trains, reads = every.among(self.trains, "trains"), every.among(self.reads, "reads")
        seed = derived_seed(self.seed, self.calls, data_ranks(model).rank)
        self.calls += 1
        tensors = trains.local()
        snapshot = self._snapshot(tensors)
        buffers = [b for b in model.buffers() if b.device.type != "meta"]
        kept = [b.detach().clone() for b in buffers]
        rule = self.optimizer if optimizer is None else as_rule(optimizer)
        if attacker is not None and self.masters is None and narrow(tensors):
            raise ValueError(
                "attacker: expected weights in fp32, or masters='fp32', since what he has changed would be rounded "
                f"away; got weights in {tensors[narrow(tensors)[0]].dtype}"
            )
        snapshot.take()
        running = self._start(rule, tensors)
        tampered = Tampered(every, trains, reads, running, self._judge(rule), self.reduce_dtype, self.gathered)
        left: dict[str, Any] = {}
        with Restoring() as guard:
            earlier = every.take_gradients()

            def restore(finished: bool) -> None:
                tampered.over = True
                every.scatter()
                every.prepare()
                snapshot.restore_()
                with torch.no_grad():
                    for b, k in zip(buffers, kept, strict=True):
                        b.copy_(k)
                every.take_gradients()
                every.put_gradients(earlier)
                every.give_back()
                if finished:
                    tampered.deliver()
                    if attacker is not None:
                        attacker.load_state_dict(left)

            guard.on_exit(restore)
            if attacker is not None:
                attacker.enter(trains, running)
            guard.release()
            with own_random_numbers(seed, [t.device for t in tensors]):
                yield tampered
                tampered.check()
                if attacker is not None:
                    left |= attacker.left(trains, running, snapshot, tampered.steps)

    def _start(self, rule: Optimizer, tensors: list[Tensor]) -> Running:
        """The attacker's optimizer on ``tensors``, by way of masters or watched where their dtype is narrow."""
        if not narrow(tensors):
            return rule.start(tensors)
        if self.masters is not None:
            given = None if isinstance(self.where, (str, int)) else self.where
            return Mastered(rule, tensors, given, derived_seed(self.seed, self.calls))
        if getattr(rule, "elementwise", False):
            return Sampled(rule, tensors)
        self._warn_once(
            rule, f"{rule!r} is not known to be elementwise: what the weights' dtype keeps of its steps is not measured"
        )
        return rule.start(tensors)

    def _judge(self, rule: Optimizer) -> Callable[[Realised, int], None]:
        def judge(found: Realised, steps: int) -> None:
            what = f"simulated attack: {rule!r} on weights in bf16 or fp16, after {steps} steps"
            found.judge(what, ADVICE, self.allow_lost, warn=repr(rule) not in self._warned)
            if not found.fidelity >= WARN_BELOW:
                self._warned.add(repr(rule))  # once a rule, not once a training step

        return judge

    def _warn_once(self, rule: Optimizer, message: str) -> None:
        if repr(rule) not in self._warned:
            warnings.warn(f"simulated attack: {message}", RuntimeWarning, stacklevel=5)
            self._warned.add(repr(rule))

    def _snapshot(self, tensors: list[Tensor]) -> Snapshot:
        """A snapshot of ``tensors``; pinned host buffers are kept from attack to attack."""
        key = [t.data_ptr() for t in tensors]
        if self._host is not None and self._host[0] == key:
            return self._host[1]
        snapshot = Snapshot(tensors, self.where)
        self._host = (key, snapshot) if snapshot.location == "host" else None
        return snapshot

    def state_dict(self) -> dict[str, int]:
        """The number of attacks so far."""
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after that many attacks."""
        self.calls = int(state["calls"])


class Tampered:
    """The model in the middle of an attack.

    Attributes:
        steps: steps that the attacker has taken.
        over: whether the attack has ended, and the model is the original again.
        realised: what bf16 or fp16 kept of the first of them, when last measured; None where nothing was.
        reduction_cosine: of the first step's gradient, added up in ``reduce_dtype``, to what it is otherwise, over all
            parameters; 0-dim. None before that step, and where nothing is sharded or no such dtype is given.
    """

    def __init__(
        self,
        every: Weights,
        trains: Weights,
        reads: Weights,
        running: Running,
        judge: Callable[[Realised, int], None],
        reduce_dtype: torch.dtype | None = None,
        gathered: bool = False,
    ) -> None:
        self._reduce_dtype, self._gathered = reduce_dtype, gathered
        self.reduction_cosine: Tensor | None = None
        self._every, self._trains, self._reads = every, trains, reads
        self._running, self._judge = running, judge
        self.realised: Realised | None = None
        self._accumulated: list[Tensor | None] = [None] * len(reads)
        self._losses: list[tuple[str, Tensor]] = []
        self.steps = 0
        self.over = False

    def step(self, loss: Losses) -> Tensor:
        """Differentiate ``loss``, take one step of the attacker's optimizer, and return the loss, detached.

        loss: a function that runs the forward and returns a 0-dim loss; pairs of such a function and a weight, the loss
            being the weighted sum; or a loss whose forward has run, of which more may be differentiated than is wanted.
        """
        what = f"attacker's loss at step {self.steps}"
        if self._gathered and not isinstance(loss, Tensor):
            self._trains.gather()
        usual: list[Tensor | None] | None = None
        if self._reduce_dtype is not None and self._every.sharded and not self.steps and not isinstance(loss, Tensor):
            loss = list(loss) if isinstance(loss, Iterable) else loss
            with same_random_numbers(self._every.local()):
                usual = self._gradients(loss, self._trains, what)[1]
        with self._every.reducing_in(self._reduce_dtype):
            value, gradients = self._gradients(loss, self._trains, what)
        if usual is not None:
            self.reduction_cosine = self._trains.cosine(gradients, usual)
        self._running.step(gradients)
        torch.clear_autocast_cache()  # an enclosing autocast holds the weights, cast, for all forwards inside it
        self.steps += 1
        return value

    def accumulate(self, loss: Losses, weight: float = 1.0) -> Tensor:
        """Add ``weight`` times the gradient of ``loss`` at the tampered weights to what the defender will get.

        loss: as for `step`. Returns the loss, detached.
        """
        if not math.isfinite(weight):
            raise ValueError(f"weight: expected a finite number, got {weight!r}")
        what = f"defender's loss after {self.steps} steps of the attacker"
        self._every.scatter()
        value, gradients = self._gradients(loss, self._reads, what)
        self.check()
        given = [(a, g) for a, g in zip(self._accumulated, gradients, strict=True) if a is not None and g is not None]
        sums = [a for a, _ in given]
        with span("accumulate", sums, 3):
            accumulate_(sums, [g for _, g in given], weight)
        first = {i: g for i, g in enumerate(gradients) if g is not None and self._accumulated[i] is None}
        with span("accumulate", list(first.values()), 2):
            for i, grad in first.items():
                self._accumulated[i] = weight * grad.to(accumulation_dtype(grad.dtype))
        return value

    def _gradients(self, losses: Losses, weights: Weights, what: str) -> tuple[Tensor, list[Tensor | None]]:
        """The loss, and its gradients for ``weights``."""
        if self.over:
            raise RuntimeError("simulated attack: it is over; step and accumulate belong inside `with attack.at(...)`")
        if isinstance(losses, Tensor):
            value = self._backward(losses, 1.0, weights, what)
        else:
            if not callable(losses) and not isinstance(losses, Iterable):
                raise TypeError(
                    f"loss: expected a 0-dim tensor, got {type(losses).__name__}; or functions that give one"
                )
            values = []
            for loss, weight in [(losses, 1.0)] if callable(losses) else losses:
                with self._every.only(weights):
                    values.append(self._backward(loss(), weight, weights, what))
            if not values:
                raise ValueError("loss: expected at least one pass, got none")
            value = torch.stack(values).sum(0)
        gradients = weights.take_gradients()
        self._every.take_gradients()
        weights.average(gradients, resting=not isinstance(losses, Tensor) and len(weights) < len(self._every))
        return value, gradients

    def _backward(self, loss: Tensor, weight: float, weights: Weights, what: str) -> Tensor:
        """Of weight * loss; returns that, detached."""
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss: expected a 0-dim tensor, got {type(loss).__name__}")
        if loss.dim() != 0:
            raise ValueError(f"loss: expected a 0-dim tensor, got shape {tuple(loss.shape)}")
        if not loss.requires_grad:
            raise ValueError("loss: it does not depend on any parameter that requires a gradient")
        loss = weight * loss
        self._losses.append((what, loss.detach()))
        if len(weights) == len(self._every) or not _plain(self._every):
            loss.backward()
        else:  # the products for the other parameters' gradients are spared
            loss.backward(inputs=weights.parameters)
        self._every.refuse_waiting_gradients()
        self._every.prepare()
        return loss.detach()

    def check(self) -> None:
        """Raise, on every rank alike, if a loss so far was not finite, or the attacker's steps were rounded away.

        Checked when the defender reads and at the end, not at every step: an attacker's steps need not wait for the
        host.
        """
        with span("finite losses"):
            self._check_losses()
            found = self._running.measure() if isinstance(self._running, Sampled) else None
            if found is not None:
                self.realised = found
                self._judge(found, self.steps)

    def _check_losses(self) -> None:
        if not self._losses:
            return
        values = torch.stack([loss.float() for _, loss in self._losses])
        names = [name for name, _ in self._losses]
        self._losses = []
        if on_every_rank(torch.isfinite(values).all()):
            return
        for name, value in zip(names, values.tolist(), strict=True):
            if not abs(value) < float("inf"):
                raise FloatingPointError(f"simulated attack: the {name} is {value}")
        raise FloatingPointError("simulated attack: a loss is not finite on another rank")

    def deliver(self) -> None:
        """Add the accumulated gradient to the parameters'; raises a FloatingPointError if it is not finite."""
        held = [i for i, a in enumerate(self._accumulated) if a is not None]
        if not held:
            return
        sums = [a for a in self._accumulated if a is not None]
        some = self._reads.subset(held)
        if not on_every_rank(torch.isfinite(some.norm(sums))):
            raise FloatingPointError("simulated attack: the accumulated gradient is not finite")
        earlier = some.take_gradients()
        for i, grad in enumerate(earlier):
            if grad is not None:
                sums[i].add_(grad)
        some.put_gradients(list(sums))
        self._accumulated = [None] * len(self._accumulated)


def _expect_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def _plain(weights: Weights) -> bool:
    """Whether backward may be told which gradients are wanted: not under FSDP2 or DDP, which expect all of them."""
    return not weights.sharded and not weights.replicated
