"""One of two processes that check LanguageModelLoss under FSDP2 and DDP: ``language_model_worker.py RANK STORE``.

The reference is one process that averages the ranks' micro-batches. Prints a line per case; raises at the first that
fails.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from fastguard.losses.language_model import LanguageModelLoss
from losses.distributed_worker import main, shard
from tiny_models import assert_same_gradients, gradients, tiny

TOLERANCE = 1e-6


def batch_of(rank: int) -> dict[str, Tensor]:
    """A micro-batch; rank 1's has fewer tokens that carry loss."""
    g = torch.Generator().manual_seed(rank)
    ids = torch.randint(1, 97, (2, 9), generator=g)
    return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(9) < 3 + 3 * rank, -100)}


def model_of(case: dict, seed: int = 0) -> nn.Module:
    model = tiny(case["model"], torch.float64, seed, num_hidden_layers=2)
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


CASES: dict[str, dict] = {
    "root, checkpointing": {"model": "llama", "layout": "root", "checkpointing": True},
    "norm and head": {"model": "llama", "layout": "norm and head"},
    "tied": {"model": "llama_tied", "layout": "root", "reshard": True},
    "head bias": {"model": "phi", "layout": "root"},
    "ddp, checkpointing": {"model": "llama", "layout": "ddp", "checkpointing": True},
}


if __name__ == "__main__":
    main(CASES, run)
