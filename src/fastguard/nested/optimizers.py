"""The attacker's optimizers: made for one simulated attack, dropped after it, apart from the defender's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from fastguard.nested.profile import span
from fastguard.ops.multi_tensor import accumulate_, adamw_
from fastguard.ops.precision import accumulation_dtype


class Running(Protocol):
    """An optimizer in the middle of an attack."""

    def step(self, gradients: Sequence[Tensor | None]) -> None:
        """Move the tensors it was started on; a None gradient leaves its tensor alone."""


@runtime_checkable
class Resumable(Running, Protocol):
    """One that another attack can go on from; see ``nested.persistent``."""

    tensors: Sequence[Tensor]
    """What it moves."""

    def state(self) -> list[dict[str, Any]]:
        """What it knows of each of its tensors: tensors, of that one's shape where they are large, and numbers."""

    def resume(self, state: Sequence[dict[str, Any]]) -> None:
        """Go on from there; the tensors become its own."""


class Optimizer(Protocol):
    """What an attacker is given: a rule without state.

    One that moves each number by this number's gradients alone says so by an attribute ``elementwise = True``; what
    bf16 keeps of its steps can then be measured on a sample.
    """

    def start(self, tensors: Sequence[Tensor]) -> Running:
        """A fresh optimizer on ``tensors``, which it will write to."""


def resumable(running: Running) -> Resumable:
    """``running`` itself; raises a TypeError where it cannot be gone on from."""
    if isinstance(running, Resumable):
        return running
    raise TypeError(
        "optimizer: expected one that a persistent attacker can go on with, such as fastguard.nested.AdamW, whose "
        f"start(tensors) gives tensors, state() and resume(state); got a {type(running).__module__}."
        f"{type(running).__qualname__}"
    )


def as_rule(optimizer: object, name: str = "optimizer") -> Optimizer:
    """``optimizer`` itself; raises a TypeError where it is no rule to be started, such as a class or one of torch's."""
    if not isinstance(optimizer, type) and callable(getattr(optimizer, "start", None)):
        return optimizer  # type: ignore[return-value]
    if isinstance(optimizer, type):
        got = f"the class {optimizer.__module__}.{optimizer.__qualname__}"
    else:
        got = f"a {type(optimizer).__module__}.{type(optimizer).__qualname__}"
    raise TypeError(
        f"{name}: expected a rule with start(tensors), such as fastguard.nested.AdamW(lr=2e-5) or SGD(lr=2e-5), which "
        f"begins anew in every attack; got {got}"
    )


def _require(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019), ``torch.optim.AdamW``'s defaults.

    state_dtype: of both moments; None is fp32, and float64 for float64 parameters.
    """

    lr: float = 2e-5
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    state_dtype: torch.dtype | None = None
    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _require(self.lr >= 0, "lr", self.lr, "a number >= 0")
        _require(all(0 <= b < 1 for b in self.betas), "betas", self.betas, "two numbers in [0, 1)")
        _require(self.eps >= 0, "eps", self.eps, "a number >= 0")

    def start(self, tensors: Sequence[Tensor]) -> Running:
        """See `Optimizer.start`; the moments of a tensor appear with its first gradient."""
        return _AdamW(self, tensors)


class _AdamW:
    def __init__(self, rule: AdamW, tensors: Sequence[Tensor]) -> None:
        self.rule, self.tensors = rule, list(tensors)
        self.first: dict[int, Tensor] = {}
        self.second: dict[int, Tensor] = {}
        self.steps: dict[int, int] = {}

    def step(self, gradients: Sequence[Tensor | None]) -> None:
        given = [i for i, g in enumerate(gradients) if g is not None]
        with span("inner AdamW, its moments made"):
            self._count(given)
        by_step: dict[int, list[int]] = {}  # one launch, unless a parameter missed a gradient (an expert not routed to)
        for i in given:
            by_step.setdefault(self.steps[i], []).append(i)
        for step, at in by_step.items():
            tensors = [self.tensors[i] for i in at]
            with span("inner AdamW", tensors, 7):
                adamw_(
                    tensors, [g for i in at if (g := gradients[i]) is not None],
                    [self.first[i] for i in at], [self.second[i] for i in at], step,
                    lr=self.rule.lr, beta1=self.rule.betas[0], beta2=self.rule.betas[1], eps=self.rule.eps,
                    weight_decay=self.rule.weight_decay,
                )  # fmt: skip

    def state(self) -> list[dict[str, Any]]:
        """See `Resumable.state`; empty for a tensor that had no gradient yet."""
        return [
            {"first": self.first[i], "second": self.second[i], "steps": self.steps[i]} if i in self.first else {}
            for i in range(len(self.tensors))
        ]

    def resume(self, state: Sequence[dict[str, Any]]) -> None:
        """See `Resumable.resume`."""
        for i, own in enumerate(state):
            if own:
                self.first[i], self.second[i], self.steps[i] = own["first"], own["second"], own["steps"]

    def _count(self, given: Sequence[int]) -> None:
        """One more step of these tensors; before the first, their moments."""
        for i in given:
            if i not in self.first:
                t = self.tensors[i]
                dtype = self.rule.state_dtype or accumulation_dtype(t.dtype)
                self.first[i], self.second[i] = (torch.zeros(t.shape, dtype=dtype, device=t.device) for _ in range(2))
            self.steps[i] = self.steps.get(i, 0) + 1


@dataclass(frozen=True)
class SGD:
    """Plain gradient descent."""

    lr: float = 2e-5
    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _require(self.lr >= 0, "lr", self.lr, "a number >= 0")

    def start(self, tensors: Sequence[Tensor]) -> Running:
        """See `Optimizer.start`."""
        return _SGD(self, tensors)


class _SGD:
    def __init__(self, rule: SGD, tensors: Sequence[Tensor]) -> None:
        self.rule, self.tensors = rule, list(tensors)

    def step(self, gradients: Sequence[Tensor | None]) -> None:
        given = [(t, g) for t, g in zip(self.tensors, gradients, strict=True) if g is not None]
        tensors = [t for t, _ in given]
        with span("inner SGD", tensors, 3):
            accumulate_(tensors, [g for _, g in given], -self.rule.lr)

    def state(self) -> list[dict[str, Any]]:
        """See `Resumable.state`: there is none."""
        return [{} for _ in self.tensors]

    def resume(self, state: Sequence[dict[str, Any]]) -> None:
        """See `Resumable.resume`."""
