"""TAR's outer step and Random Mapping as published, written eagerly: full logits, a second model, clones.

An independent statement of both algorithms (Tamirisa et al. 2024, arXiv 2408.00761, with the choices of the released
code) for tests and benchmarks; it shares no code with fastguard. Gradients are left on the model; its parameters are
as before.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = dict[str, Tensor]


def labels_of(batch: Batch) -> Tensor:
    """The batch's labels, or its tokens with padding ignored, as the published collator makes them."""
    if "labels" in batch:
        return batch["labels"]
    return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)


def inputs(batch: Batch) -> Batch:
    return {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def negative_entropy(logits: Tensor) -> Tensor:
    """Of every position, averaged."""
    return (logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()


def sequence_logp(model: nn.Module, batch: Batch) -> Tensor:
    logp = model(**inputs(batch)).logits[:, :-1].log_softmax(-1)
    labels = labels_of(batch)[:, 1:]
    kept = labels != -100
    return (logp.gather(-1, labels.masked_fill(~kept, 0)[..., None])[..., 0] * kept).sum(1)


def dpo(model: nn.Module, frozen: nn.Module, pairs: dict[str, Batch], beta: float) -> Tensor:
    with torch.no_grad():
        before = sequence_logp(frozen, pairs["chosen"]) - sequence_logp(frozen, pairs["rejected"])
    now = sequence_logp(model, pairs["chosen"]) - sequence_logp(model, pairs["rejected"])
    return -F.logsigmoid(beta * (now - before)).mean()


def retain_loss(model: nn.Module, frozen: nn.Module | None, batch: Batch) -> Tensor:
    """Cross-entropy, plus the distance from ``frozen``'s hidden states where there is one."""
    if frozen is None:
        return cross_entropy(model(**inputs(batch)).logits, labels_of(batch))
    with torch.no_grad():
        before = frozen(**inputs(batch), output_hidden_states=True).hidden_states
    out = model(**inputs(batch), output_hidden_states=True)
    distances = [torch.norm(b - a, dim=-1).mean() for a, b in zip(out.hidden_states, before, strict=True)]
    return cross_entropy(out.logits, labels_of(batch)) + torch.stack(distances).mean()


def outer_step(
    model: nn.Module,
    frozen: nn.Module | None,
    retain: Batch,
    tamper: Sequence[Any],
    attacks: Sequence[tuple[float, Iterable[Batch]]],
    *,
    steps: int = 64,
    every: int = 4,
    schedule: float | None = 0.0625,
    grad_scale: float = 4.0,
    tamper_loss: str = "max_entropy",
    beta: float = 0.1,
    retain_weight: float = 1.0,
    representations: bool = True,
    weight_decay: float = 0.01,
) -> dict[str, float]:
    """Leave one outer step's gradient in the parameters' ``grad``.

    frozen: the second model. tamper: a held-out batch an attack. attacks: (learning rate, batches) each.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    saved = {name: p.detach().clone() for name, p in trained.items()}
    collected: dict[str, Tensor] = {}
    losses: list[float] = []
    for (lr, batches), held_out in zip(attacks, tamper, strict=True):
        optimizer = torch.optim.AdamW(trained.values(), lr=lr, weight_decay=weight_decay)
        for i, batch in zip(range(steps), batches, strict=False):
            cross_entropy(model(**inputs(batch)).logits, labels_of(batch)).backward()
            optimizer.step()
            model.zero_grad(set_to_none=True)
            if (i + 1) % every:
                continue
            if tamper_loss == "dpo":
                loss = dpo(model, frozen, held_out, beta)
            else:
                loss = negative_entropy(model(**inputs(held_out)).logits)
            weight = 1 / steps if schedule is None else math.exp(schedule * (i - (steps - 1)))
            (loss * grad_scale * weight / len(attacks)).backward()
            for name, p in trained.items():
                if p.grad is not None:
                    collected[name] = collected[name] + p.grad if name in collected else p.grad.clone()
            model.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))
        with torch.no_grad():
            for name, p in trained.items():
                p.copy_(saved[name])
    loss = retain_loss(model, frozen if representations else None, retain)
    (retain_weight * loss).backward()
    for name, value in collected.items():
        grad = trained[name].grad
        trained[name].grad = value if grad is None else grad + value
    return {"retain": float(loss.detach()), "tamper": sum(losses) / len(losses)}


def contender(
    model: nn.Module, options: Any, retain: Batch, tamper: Any, adversaries: Sequence[Any]
) -> Callable[[], float]:
    """An outer step for the benchmarks, which clear the gradients before. adversaries: with ``lr`` and ``batches``."""
    frozen = copy.deepcopy(model).requires_grad_(False)
    attacks = [(one.lr, list(one.batches)) for one in adversaries]
    return lambda: outer_step(
        model, frozen, retain, [tamper] * len(attacks), attacks, steps=options.inner_steps, every=options.read_every,
        grad_scale=options.grad_scale, tamper_loss=options.tamper_loss,
    )["retain"]  # fmt: skip


def random_mapping_step(model: nn.Module, harmful: Batch, retain: Batch, table: Tensor) -> dict[str, float]:
    """Leave one Random Mapping step's gradient in the parameters' ``grad``. table: [V, D], a random row a token id."""
    ce = cross_entropy(model(**inputs(retain)).logits, labels_of(retain))
    ce.backward()
    states = model(**inputs(harmful), output_hidden_states=True).hidden_states
    rows = table[harmful["input_ids"]]
    terms = [(1 - F.cosine_similarity(h, rows, dim=-1).abs()).mean() for h in states]
    mapping = torch.stack(terms).mean()
    mapping.backward()
    return {"retain": float(ce.detach()), "mapping": float(mapping.detach())}
