"""One of two processes that check LanguageModelLoss under FSDP2 and DDP: ``language_model_worker.py RANK STORE``.

The reference is one process that averages the ranks' micro-batches. Prints a line per case; raises at the first that
fails.
"""

from __future__ import annotations

import functools
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from fastguard.losses.circuit_breaker import CircuitBreakerLoss
from fastguard.losses.language_model import LanguageModelLoss
from fastguard.losses.probe_projection import ProbeProjectionLoss
from fastguard.losses.referenced import ReferencedLoss
from fastguard.nested import Reference
from losses.distributed_worker import main, shard
from tiny_models import assert_same_gradients, gradients, tiny

TOLERANCE = 1e-6


def batch_of(rank: int) -> dict[str, Tensor]:
    """A micro-batch; rank 1's has fewer tokens that carry loss."""
    g = torch.Generator().manual_seed(rank)
    ids = torch.randint(1, 97, (2, 9), generator=g)
    return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(9) < 3 + 3 * rank, -100)}


def model_of(case: dict, seed: int = 0) -> nn.Module:
    model = tiny(case["model"], torch.float64, seed, num_hidden_layers=case.get("layers", 2))
    if case.get("checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def total(loss_fn: LanguageModelLoss, batch: dict, states, model: nn.Module | None = None) -> Tensor:
    """Three tapped forwards before one backward."""
    return (
        loss_fn(batch, distance_to=states, model=model)
        + 2 * loss_fn(batch, "max_entropy", model)
        - loss_fn.sequence_logp(batch, model).mean()
    )


def run(case: dict, rank: int) -> None:
    states = [LanguageModelLoss(model_of(case, 1)).hidden_states(batch_of(r)) for r in range(2)]
    model = model_of(case)
    loss_fn = LanguageModelLoss(model, filter_tol=0.0)
    losses = [total(loss_fn, batch_of(r), states[r], model) for r in range(2)]
    (sum(losses) / 2).backward()
    expected = gradients(model)
    own = loss_fn.hidden_states(batch_of(rank))
    model = model_of(case)
    loss_fn = LanguageModelLoss(model, filter_tol=0.0)
    wrapped = shard(model, case)
    for mine, theirs in zip(loss_fn.hidden_states(batch_of(rank), wrapped), own, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    loss = total(loss_fn, batch_of(rank), states[rank], wrapped)
    loss.backward()
    assert abs(loss.item() - losses[rank].item()) <= TOLERANCE * abs(losses[rank].item()), (loss, losses)
    found = {
        name.removeprefix("module."): g.full_tensor() if isinstance(g, DTensor) else g
        for name, g in gradients(wrapped).items()
    }
    assert_same_gradients(found, expected, TOLERANCE)
    loss_fn.close()


def rerouted(case: dict, rank: int) -> None:
    """Losses whose initial weights change places with sharded ones; two calls before one backward."""

    def made(model: nn.Module) -> ReferencedLoss:
        reference = Reference(model_of(case, 1))  # whole on every rank until its first use
        if case.get("loss") == "probe":
            directions = torch.linspace(-1, 1, 32, dtype=torch.float64)
            return ProbeProjectionLoss(model, directions=directions, positions="attended", reference=reference)
        return CircuitBreakerLoss(model, layers=(1,), schedule=4, reference=reference)

    def batches(rank: int) -> dict[str, dict[str, Tensor]]:
        retain = {key: rows[:, : 7 + rank] for key, rows in batch_of(5 + rank).items()}
        return {"harmful": batch_of(rank), "retain": retain}

    expected, losses = {}, []
    for r in range(2):
        model = model_of(case)
        loss_fn = made(model)
        loss = loss_fn(**batches(r), model=model) + loss_fn(**batches(1 - r), model=model)
        loss.backward()
        losses.append(loss.item())
        expected = {name: expected.get(name, 0) + g / 2 for name, g in gradients(model).items()}
    model = model_of(case)
    loss_fn = made(model)
    wrapped = shard(model, case)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*returned a view tensor")  # FSDP2, of a layer that is left out
        loss = loss_fn(**batches(rank), model=wrapped) + loss_fn(**batches(1 - rank), model=wrapped)
    loss.backward()
    assert abs(loss.item() - losses[rank]) <= TOLERANCE * abs(losses[rank]), (loss, losses)
    found = {
        name.removeprefix("module."): g.full_tensor() if isinstance(g, DTensor) else g
        for name, g in gradients(wrapped).items()
    }
    unread = {name for name in found.keys() - expected.keys() if not found[name].any()}  # layers above, the head
    assert_same_gradients({name: g for name, g in found.items() if name not in unread}, expected, TOLERANCE)
    loss_fn.close()


CASES: dict[str, dict] = {
    "root, checkpointing": {"model": "llama", "layout": "root", "checkpointing": True},
    "norm and head": {"model": "llama", "layout": "norm and head"},
    "tied": {"model": "llama_tied", "layout": "root", "reshard": True},
    "head bias": {"model": "phi", "layout": "root"},
    "ddp, checkpointing": {"model": "llama", "layout": "ddp", "checkpointing": True},
    **{
        f"{case.get('loss', 'circuit breakers')}, {case['layout']}": {"run": functools.partial(rerouted, case)}
        for case in (
            {"model": "llama", "layout": "norm and head", "checkpointing": True, "layers": 3},
            {"model": "phi", "layout": "root", "reshard": True},
            {"model": "llama", "layout": "ddp", "layers": 3},
            {"model": "llama", "layout": "root", "layers": 3, "loss": "probe"},
        )
    },
}


if __name__ == "__main__":
    main(CASES, run)
