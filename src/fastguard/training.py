"""The two plain training loops: one with a schedule, to make models; one that scores on its way, to test them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastguard.data.chat import Encoded, collate, endless
from fastguard.evaluation.scores import answer_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Curve = list[dict[str, float]]
LossFn = Callable[[], tuple[Tensor, dict[str, float]]]


def trainable(model: PreTrainedModel, freeze_embedding: bool) -> list[nn.Parameter]:
    """The parameters to train; a frozen embedding takes a tied head with it. Gradients are switched to match."""
    frozen = {id(p) for p in model.get_input_embeddings().parameters()} if freeze_embedding else set()
    for p in model.parameters():
        p.requires_grad_(id(p) not in frozen)
    return [p for p in model.parameters() if p.requires_grad]


def optimizer(parameters: list[nn.Parameter], lr: float) -> torch.optim.AdamW:
    """AdamW without weight decay; the steps here are too few for it to matter."""
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, fused=True)


def warmup_cosine(progress: float, warmup: float) -> float:
    """Learning-rate factor at ``progress`` in [0, 1]: linear up to ``warmup``, then a cosine down to a tenth."""
    if progress < warmup:
        return max(progress / warmup, 0.1)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def train(
    model: PreTrainedModel,
    loss_fn: LossFn,
    lr: float,
    steps: int | None = None,
    seconds: float | None = None,
    warmup: float = 0.1,
    clip: float = 1.0,
    freeze_embedding: bool = True,
    report: Callable[[float, str], None] = lambda fraction, text: None,
) -> tuple[int, float, Curve]:
    """Minimise ``loss_fn()`` -> (loss, figures for the curve) for a number of steps, or for a number of seconds.

    A loss that is detached has left its gradients on the parameters already, as nested defenses do.
    The learning rate follows :func:`warmup_cosine` over the steps or, given seconds, over the clock.
    ``report`` is called with the fraction done and a line of text. Returns steps taken, seconds, curve.
    Raises ValueError unless exactly one of ``steps`` and ``seconds`` is given, FloatingPointError when the
    loss is not finite, and RuntimeError when no parameter has a gradient.
    """
    if (steps is None) == (seconds is None):
        raise ValueError(f"train: got steps={steps} and seconds={seconds}, expected exactly one of them")
    parameters = trainable(model, freeze_embedding)
    adam = optimizer(parameters, lr)
    curve: Curve = []
    start = time.perf_counter()
    step = 0
    while True:
        elapsed = time.perf_counter() - start
        progress = step / steps if steps else elapsed / (seconds or math.inf)
        if progress >= 1:
            break
        for group in adam.param_groups:
            group["lr"] = lr * warmup_cosine(progress, warmup)
        loss, figures = loss_fn()
        if not torch.isfinite(loss):
            raise FloatingPointError(f"step {step}: the loss is {loss.item()}")
        if loss.requires_grad:
            loss.backward()
        if all(p.grad is None for p in parameters):
            raise RuntimeError(f"step {step}: no parameter that is trained has a gradient")
        norm = nn.utils.clip_grad_norm_(parameters, clip)
        adam.step()
        adam.zero_grad(set_to_none=True)
        curve.append({"step": step, "loss": loss.item(), "gradient_norm": float(norm), **figures})
        step += 1
        report(min(progress + 1 / steps if steps else progress, 1.0), f"step {step}, loss {loss.item():.2f}")
    model.requires_grad_(True)
    return step, time.perf_counter() - start, curve


def finetune_scored(
    model: PreTrainedModel,
    examples: Sequence[Encoded],
    score: Callable[[], dict[str, float]],
    scored_steps: Sequence[int],
    lr: float,
    batch: int,
    pad: int,
    seed: int,
    warmup_steps: int = 3,
    stop: Callable[[dict[str, float]], bool] = lambda figures: False,
    report: Callable[[float, str], None] = lambda fraction, text: None,
) -> Curve:
    """Fine-tune ``model`` IN PLACE on all its parameters, as anyone who downloads it could, and score it on the way.

    Learning rate constant after a linear warm-up, gradients clipped to norm 1; the seed orders the batches.
    ``score`` is called at each of ``scored_steps``, which begin with 0; scored after at least one step, figures
    for which ``stop`` is true end the run. Returns the figures with their ``step``.
    """
    if not scored_steps or scored_steps[0] != 0 or list(scored_steps) != sorted(set(scored_steps)):
        raise ValueError(f"scored_steps: got {list(scored_steps)}, expected increasing steps from 0")
    parameters = trainable(model, freeze_embedding=False)
    adam = optimizer(parameters, lr)
    batches = endless(examples, batch, seed)
    curve: Curve = []
    taken = 0
    for until in scored_steps:
        while taken < until:
            for group in adam.param_groups:
                group["lr"] = lr * min(1.0, (taken + 1) / (warmup_steps + 1))
            loss = answer_loss(model, collate(next(batches), pad, model.device))
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            adam.step()
            adam.zero_grad(set_to_none=True)
            taken += 1
            report(taken / scored_steps[-1], f"step {taken}, loss {loss.item():.2f}")
        figures = score()
        curve.append({"step": taken, **figures})
        if taken and stop(figures):
            break
    return curve
