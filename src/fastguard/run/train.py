"""The one training loop: a method leaves gradients, this steps. It makes models, and it attacks them."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastguard.methods.edit import Batches, Edit
from fastguard.methods.passes import finite_norm
from fastguard.methods.training import Data, Training
from fastguard.nested.weights import Weights
from fastguard.parallel import first_of
from fastguard.run.keep import Keeper
from fastguard.run.optimizers import OptimizerConfig, averaged
from fastguard.taps.structure import reshard

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Curve = list[dict[str, float]]
Report = Callable[[float, str], None]


def trainable(model: PreTrainedModel, freeze_embedding: bool) -> list[nn.Parameter]:
    """The parameters to train; a frozen embedding takes a tied head with it. Gradients are switched to match."""
    reshard(model)  # what a forward has left gathered are no parameters
    frozen = {id(p) for p in model.get_input_embeddings().parameters()} if freeze_embedding else set()
    for p in model.parameters():
        p.requires_grad_(id(p) not in frozen)
    return [p for p in model.parameters() if p.requires_grad]


class Loop:
    """Steps of an optimizer on a method's gradients, clipped.

    Args:
        method: made on the model, of which the parameters that require a gradient are trained.
        data: streams of the method's roles. optimizer: what steps. By default AdamW without weight decay, for which the
            steps of a defense are too few.

    Attributes:
        curve: figures of the steps so far. seconds: that they took, by the first process's clock.
    """

    def __init__(self, method: Training, data: Data, optimizer: OptimizerConfig | None = None) -> None:
        optimizer = optimizer or OptimizerConfig()
        self.method, self.data, self.clip = method, data, optimizer.clip
        reshard(method.model)
        self.parameters = [p for p in method.model.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("model: no parameter requires a gradient, so that there is nothing to train")
        self.optimizer = optimizer.build(self.parameters)
        self.curve: Curve = []
        self.seconds = 0.0
        method.trained_by(self.optimizer)

    @property
    def counted(self) -> dict[str, Any]:
        """What a checkpoint keeps beside model and optimizer."""
        return {"method": self.method, "loop": self}

    def state_dict(self) -> dict[str, Any]:
        """The steps so far."""
        return {"curve": self.curve, "seconds": self.seconds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after them."""
        self.curve, self.seconds = list(state["curve"]), float(state["seconds"])

    def step(self, lr: float) -> dict[str, float]:
        """One step; its figures, which the curve has too.

        Raises FloatingPointError where loss or gradient is not finite, RuntimeError where there is no gradient.
        """
        number, start = len(self.curve), time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        figures = self.method.backward(**self.method.draw(self.data))
        if all(p.grad is None for p in self.parameters):
            raise RuntimeError(f"step {number}: no parameter that is trained has a gradient")
        norm = self._clipped()
        if not torch.isfinite(norm):
            raise FloatingPointError(f"step {number}: the gradient's norm is {float(norm)}")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        point = {"step": number, "loss": float(figures["loss"]), "gradient_norm": float(norm)}
        point |= {name: float(value) for name, value in figures.items() if name != "loss"}
        self.curve.append(point)
        self.seconds += first_of(time.perf_counter() - start)
        return point

    def _clipped(self) -> Tensor:
        """The gradient's norm before it was clipped."""
        if not any(hasattr(p, "placements") for p in self.parameters):
            return nn.utils.clip_grad_norm_(self.parameters, self.clip)
        weights = Weights(self.method.model, self.parameters)  # knows which ranks hold the other shards
        gradients = weights.take_gradients()
        given = [g for g in gradients if g is not None]
        norm = finite_norm(weights, gradients, "the gradient")
        torch._foreach_mul_(given, torch.clamp(self.clip / (norm + 1e-6), max=1.0).to(given[0].dtype))
        weights.put_gradients(gradients)
        return norm


def train(
    method: Training,
    data: Data,
    lr: float,
    steps: int | None = None,
    seconds: float | None = None,
    warmup: float = 0.1,
    report: Report = lambda fraction, text: None,
    keeper: Keeper | None = None,
    optimizer: OptimizerConfig | None = None,
) -> tuple[int, float, Curve]:
    """Train for a number of steps, or for a number of seconds.

    The learning rate follows the schedule of ``optimizer`` over the steps or, given seconds, over the clock.
    ``report`` is called with the fraction done and a line of text. ``keeper`` saves on the way, takes up what it has
    saved, and writes down each step. Returns steps taken, seconds, curve.
    Raises ValueError unless exactly one of ``steps`` and ``seconds`` is given; else as `Loop.step`, or `keep.Stopped`.
    """
    if (steps is None) == (seconds is None):
        raise ValueError(f"train: got steps={steps} and seconds={seconds}, expected exactly one of them")
    optimizer = optimizer or OptimizerConfig()
    loop, keeper = Loop(method, data, optimizer), keeper or Keeper(None)
    with keeper.over(loop):
        while True:
            step = len(loop.curve)
            progress = step / steps if steps else loop.seconds / (seconds or math.inf)
            if progress >= 1:
                break
            point = loop.step(lr * optimizer.factor(progress, warmup))
            keeper.after_step(loop)
            done = min(progress + 1 / steps if steps else progress, 1.0)
            report(done, f"step {step + 1}, loss {point['loss']:.2f}")
    averaged(loop.optimizer)
    return step, loop.seconds, loop.curve


def train_scored(
    method: Training,
    data: Data,
    score: Callable[[], dict[str, float]],
    scored_steps: Sequence[int],
    lr: float,
    warmup_steps: int = 3,
    stop: Callable[[dict[str, float]], bool] = lambda figures: False,
    report: Report = lambda fraction, text: None,
) -> Curve:
    """Train as anyone who downloads the model could, and score it on the way.

    Learning rate constant after a linear warm-up. ``score`` is called at each of ``scored_steps``, which begin with 0;
    scored after at least one step, figures for which ``stop`` is true end the run. Returns the figures with their
    ``step``.
    """
    if not scored_steps or scored_steps[0] != 0 or list(scored_steps) != sorted(set(scored_steps)):
        raise ValueError(f"scored_steps: got {list(scored_steps)}, expected increasing steps from 0")
    loop, keeper, curve = Loop(method, data), Keeper(None), list[dict[str, float]]()
    for until in scored_steps:
        while (taken := len(loop.curve)) < until:
            point = loop.step(lr * min(1.0, (taken + 1) / (warmup_steps + 1)))
            keeper.after_step(loop)
            report((taken + 1) / scored_steps[-1], f"step {taken + 1}, loss {point['loss']:.2f}")
        figures = score()
        curve.append({"step": until, **figures})
        if until and stop(figures):
            break
    return curve


def edit(method: Edit, data: Batches, report: Report = lambda fraction, text: None) -> tuple[int, float, Curve]:
    """Let an edit make all its rounds. Returns rounds made, seconds, and the figures of each with its ``step``."""
    start, curve = time.perf_counter(), Curve()
    for number, figures in enumerate(method.apply(data)):
        curve.append({"step": float(number), **{name: float(value) for name, value in figures.items()}})
        report(min((number + 1) / method.rounds, 1.0), f"round {number + 1}")
    return len(curve), time.perf_counter() - start, curve


def edit_scored(
    method: Edit,
    data: Batches,
    score: Callable[[], dict[str, float]],
    stop: Callable[[dict[str, float]], bool] = lambda figures: False,
    report: Report = lambda fraction, text: None,
) -> Curve:
    """Let an edit make its rounds, and score the model before the first and after each; see `train_scored`."""
    curve = [{"step": 0.0, **score()}]
    with contextlib.closing(method.apply(data)) as rounds:
        for made, figures in enumerate(rounds, start=1):
            report(made / method.rounds, f"round {made}")
            curve.append({"step": float(made), **{k: float(v) for k, v in figures.items()}, **score()})
            if stop(curve[-1]):
                break
    return curve
